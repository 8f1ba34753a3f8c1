"""Where a call's time goes, kernel by kernel: what is looked at first where a figure is missed."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.losses.call import call
from benchmarks.losses.cases import Case
from benchmarks.losses.contenders import contenders
from benchmarks.losses.inputs import Inputs

_LONGEST = 12


def stages(case: Case, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """The longest kernels (on a CPU: operators) of one warm call of the floor and of each of ours.

    Milliseconds are summed over the calls of a kernel, without what it calls itself.
    """
    x = Inputs(case, device)
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    found = {}
    for contender in contenders(case, device):
        if contender.role == "peer":
            continue
        call(contender, x)
        with profile(activities=[activity]) as profiler:
            call(contender, x)
        x.clear()
        rows = []
        for event in profiler.key_averages():
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            rows.append({"name": event.key[:120], "calls": event.count, "ms": spent / 1000})
        found[contender.name] = sorted(rows, key=lambda row: -row["ms"])[:_LONGEST]
    return found
