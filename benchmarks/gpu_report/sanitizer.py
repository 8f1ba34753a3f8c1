"""compute-sanitizer on small cases: invalid memory accesses and races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import product
from typing import Any

import torch

from benchmarks.environment import ROOT, default_device
from benchmarks.gpu_report.job import GpuJob, deal
from benchmarks.gpu_report.work import Absent, one_by_one
from benchmarks.losses.cases import Case, Shape
from benchmarks.losses.contenders import our_call, ways
from benchmarks.losses.inputs import Inputs

_PROGRAM = "compute-sanitizer"
_TOOLS = ("memcheck", "racecheck")
# racecheck reports hazards in cuBLAS' kernels on Hopper too, which are not ours. With them left out
# by --kernel-name-exclude the tool failed on an H100: "failed to handle a hardware exception".
_CUBLAS = "nvjet"
_BROKEN = "Target application returned an error"
# Two blocks of rows for any kernel; several tiles of the vocabulary, the last one partial.
_TOKENS, _SHAPE = 160, Shape("smallest", 64, 9111)
# Operations and heads of a process. Of several targets a frozen head's gradient has its own kernel.
_FAMILIES = {
    "losses": (("jsd", "trained"), ("forward_kl", "trained"), ("logprob", "trained")),
    "topk": (("topk", "trained"), ("topk", "frozen")),
}


def shards(job: GpuJob) -> list[list[str]]:
    """Each tool on each way to run each family. Raises Absent without a GPU or the tool."""
    if job.device.type != "cuda":
        raise Absent("there is no GPU here")
    if shutil.which(_PROGRAM) is None:
        raise Absent(f"{_PROGRAM} is not on the PATH")
    ids = []
    for tool, (family, calls) in product(_TOOLS, _FAMILIES.items()):
        case = Case(*calls[0], "bfloat16", _SHAPE, _TOKENS)
        ids += [f"{tool} {s} {p} {family}" for s, p in ways(case, job.device)]
    return deal(ids, job.workers)


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """{"summary", "in_cublas"}: the tool's summary lines, and lines about cuBLAS' own kernels.

    Raises RuntimeError if it found an error elsewhere, or if the program failed.
    """
    tool, *what = identifier.split()
    command = [
        _PROGRAM, "--tool", tool, "--error-exitcode", "9", "--print-limit", "10000",
        sys.executable, "-m", "benchmarks.gpu_report.sanitizer", *what,
    ]  # fmt: skip
    # The caching allocator would hide an access past a tensor's end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-20000:], sep="\n")
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    hazards = [line for line in done.stdout.splitlines() if " access at " in line]
    in_cublas = [line for line in hazards if f" access at {_CUBLAS}" in line]
    only_theirs = tool == "racecheck" and hazards == in_cublas != []
    if done.returncode and (not only_theirs or _BROKEN in done.stdout):
        ours = [line for line in hazards if line not in in_cublas]
        first = [line for line in done.stdout.splitlines() if line.startswith("=========")][1:4]
        found = " ".join([*(ours[:2] or first), *summary])
        raise RuntimeError(f"{tool} ended with {done.returncode}: {found}")
    return {"summary": " ".join(summary), "in_cublas": len(in_cublas)}


def smallest(schedule: str, precision: str, family: str) -> None:
    """The program under test: forward and backward of each operation of a family."""
    for call, dtype in product(_FAMILIES[family], ("bfloat16", "float32")):
        x = Inputs(Case(*call, dtype, _SHAPE, _TOKENS), default_device())
        if (schedule, precision) in ways(x.case, default_device()):
            our_call(x, schedule, precision).backward()
    torch.cuda.synchronize()


work = one_by_one(run)

if __name__ == "__main__":
    smallest(*sys.argv[1:])
