"""Milliseconds of every kernel and product in a call, measured and predicted by the time model."""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_report.job import SMALL, SMALL_TOKENS, GpuJob, deal
from benchmarks.gpu_report.timing import median_ms, parts
from benchmarks.gpu_report.work import one_by_one
from benchmarks.losses.cases import QWEN3_8B, Case
from benchmarks.losses.contenders import our_call, our_plan, ways
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.truth import BETA
from opsd_kernels import Plan

_TOKENS = 8192
_CALLS, _SMALL_CALLS = 3, 1
_LONGEST = 14  # kernels listed for a call


def shards(job: GpuJob) -> list[list[str]]:
    """The JSD with every schedule and precision, distinct and shared heads; then other losses."""
    every = ways(_case("jsd", "frozen", job), job.device)
    ids = [f"jsd frozen {s} {p} {head}" for s, p in every for head in ("distinct", "shared")]
    others = () if job.small else ("jsd trained", "forward_kl frozen", "cross_entropy trained")
    ids += [f"{what} blocked fp32 distinct" for what in others]
    wider = () if job.small else ("tiled fp32 distinct 64", "blocked fp32 distinct 1024")
    return deal(ids + [f"jsd frozen {what}" for what in wider], 1)


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """The call's ms, [name, calls, ms] of its kernels, longest first, and the plan.

    The id ends with the MiB of workspace if that is not the default.
    """
    operation, trained, schedule, precision, head, *size = identifier.split()
    case = _case(operation, trained, job)
    workspace = int(size[0]) * 2**20 if size else None
    x = Inputs(case, job.device)

    def call() -> None:
        x.clear()
        our_call(x, schedule, precision, head == "shared", workspace).backward()

    calls = _SMALL_CALLS if job.small else _CALLS
    whole = median_ms(call, job.device, calls)
    found: dict[str, list[tuple[int, float]]] = {}
    for _ in range(calls):
        for name, total in parts(call, job.device).items():
            found.setdefault(name, []).append(total)
    rows = [
        [name, max(n for n, _ in totals), statistics.median(ms for _, ms in totals)]
        for name, totals in found.items()
    ]
    chosen = our_plan(case, job.device, schedule, precision, workspace)
    rows.sort(key=lambda row: -row[2])
    result = {"ms": whole, "kernels": rows[:_LONGEST], "plan": str(chosen)}
    return result | _predicted(case, chosen, head == "shared", job.device)


def _predicted(case: Case, chosen: Plan, shared: bool, device: torch.device) -> dict[str, Any]:
    """{"predicted": ms by phase} of the time model; empty if it does not know the device."""
    if device.type != "cuda" or not find_spec("benchmarks.compile.model"):
        return {}
    from benchmarks.compile.gpus import GPUS
    from benchmarks.compile.model import predict

    name = torch.cuda.get_device_name(device)
    known = next((short for short in GPUS if f" {short}" in name), None)
    if known is None:
        return {}
    kind = {"kind": case.operation.replace("_", " ")} if case.operation in BETA else {}
    return {"predicted": predict(chosen, known, shared=shared, **kind)}


def _case(operation: str, head: str, job: GpuJob) -> Case:
    shape, tokens = (SMALL, SMALL_TOKENS) if job.small else (QWEN3_8B, _TOKENS)
    dtype = "float32" if job.device.type != "cuda" else "bfloat16"
    return Case(operation, head, dtype, shape, tokens)


work = one_by_one(run)
