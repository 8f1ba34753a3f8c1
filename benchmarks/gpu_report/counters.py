"""Hardware counters of one block's kernels from Nsight Compute: bytes, issue, occupancy."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.gpu_report.job import GpuJob, deal
from benchmarks.gpu_report.work import Absent, one_by_one
from benchmarks.losses.cases import QWEN3_8B, Case
from benchmarks.losses.contenders import our_call, our_plan, ways
from benchmarks.losses.inputs import Inputs

_TIME = "gpu__time_duration.sum"
METRICS = (
    _TIME,
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
_KERNELS = 5  # the longest ones


def shards(job: GpuJob) -> list[list[str]]:
    """Each precision of `blocked`. Raises Absent without a GPU or ncu."""
    if job.device.type != "cuda":
        raise Absent("there is no GPU here")
    if shutil.which("ncu") is None:
        raise Absent("ncu is not on the PATH")
    case = Case("jsd", "frozen", "bfloat16", QWEN3_8B, 8192)
    return deal((f"{s} {p}" for s, p in ways(case, job.device) if s == "blocked"), 1)


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """{"kernels": [...]}: name and METRICS of each kernel, longest first."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "benchmarks.gpu_report.counters", *identifier.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-20000:], sep="\n")
    kernels = longest(done.stdout)
    if done.returncode or len(kernels) < _KERNELS:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise RuntimeError(
            f"ncu ended with {done.returncode} and {len(kernels)} kernels of {_KERNELS}: {last}"
        )
    return {"kernels": kernels}


def longest(text: str) -> list[dict[str, Any]]:
    """The longest kernels in ncu's CSV output, which has a row of units below the header."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))[1:]
    found = [
        {"name": row["Kernel Name"][:120]} | {m: _number(row[m]) for m in METRICS if m in row}
        for row in rows
    ]
    return sorted(found, key=lambda kernel: -kernel[_TIME])[:_KERNELS]


def _number(text: str) -> float | None:
    """A number of ncu's; None if it has no value."""
    text = text.replace(",", "")
    return float(text) if text.replace(".", "", 1).isdigit() else None


def one_block(schedule: str, precision: str) -> None:
    """The profiled call: a JSD over the tokens of one block, after a call that compiles it."""
    device = torch.device("cuda")
    case = Case("jsd", "frozen", "bfloat16", QWEN3_8B, 8192)
    rows = our_plan(case, device, schedule, precision).rows_per_block
    x = Inputs(replace(case, tokens=rows), device)
    our_call(x, schedule, precision).backward()
    torch.cuda.synchronize()
    x.clear()
    torch.cuda.profiler.start()
    our_call(x, schedule, precision).backward()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


work = one_by_one(run)

if __name__ == "__main__":
    one_block(*sys.argv[1:])
