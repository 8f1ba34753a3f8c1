"""Compiles the Triton kernels for GPUs that are not here; figures into a file, or against one.

    python -m benchmarks.compile                 # everything, into benchmarks/results/compile.json
    python -m benchmarks.compile --check --hot   # what training runs by default, against that file

With --check the exit status is 1 where a kernel spills more than the file says (or at all, when it
is not in the file), needs more shared memory than the device has, or multiplies on sm_90 without
wgmma.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.compile.build import build
from benchmarks.compile.launches import CAPABILITIES, HIDDEN, Kind, Launch, launches
from benchmarks.environment import ROOT, environment

FILE = ROOT / "benchmarks" / "results" / "compile.json"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What training has; fp32; rows that end inside a tile; rows that do not start at whole 16 bytes.
KINDS = [
    Kind(),
    Kind(torch.float32),
    Kind(torch.bfloat16, 99, 99),
    Kind(torch.float32, 99, 99),
    Kind(torch.bfloat16, HIDDEN, HIDDEN + 1),
]


def main(arguments: list[str] | None = None) -> int:
    """0 when all is compiled and, with --check, nothing is worse than the file says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="compare with the file, do not write")
    parser.add_argument("--hot", action="store_true", help="only what training runs by default")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    kinds = KINDS[:1] if options.hot else KINDS
    work = [
        (target, kind, launch)
        for target in CAPABILITIES
        for kind in kinds
        for launch in launches(target, kind, options.hot)
    ]
    print(f"{len(work)} compilations with Triton {triton.__version__}", flush=True)
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        kernels = list(workers.map(_one, work))
    if options.check:
        faults = compare(kernels, json.loads(options.file.read_text())["kernels"])
        print("\n".join(faults) or "nothing worse than the file says")
        return int(bool(faults))
    found = {"kind": "compile", "environment": environment(), "kernels": kernels}
    options.file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{sum(k['spilled_bytes'] > 0 for k in kernels)} of {len(kernels)} spill: {options.file}")
    return 0


def _one(work: tuple[int, Kind, Launch]) -> dict[str, Any]:
    target, kind, launch = work
    return {"inputs": str(kind), **build(target, launch)}


def compare(kernels: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[str]:
    """What is worse than `known`, a sentence each."""
    before: dict[str, int] = {}
    for k in known:
        before[_name(k)] = max(before.get(_name(k), 0), k["spilled_bytes"])
    faults = []
    for k in kernels:
        allowed = before.get(_name(k), 0)
        if k["spilled_bytes"] > allowed:
            faults.append(f"{_name(k)}: spills {k['spilled_bytes']} bytes, allowed {allowed}")
        if k["shared_bytes"] > SHARED_BYTES[k["target"]]:
            faults.append(f"{_name(k)}: {k['shared_bytes']} bytes of shared memory do not fit")
        tensor_cores = k["case"].startswith("streaming") and "float32" not in k["inputs"]
        if tensor_cores and k["target"] == 90 and k["matrix"] != "wgmma.mma_async":
            faults.append(f"{_name(k)}: its products are {k['matrix']}, not wgmma")
    return faults


def _name(k: dict[str, Any]) -> str:
    return f"sm_{k['target']} {k['inputs']} {k['kernel']} {k['case']}"


if __name__ == "__main__":
    sys.exit(main())
