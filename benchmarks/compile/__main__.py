"""Compile the Triton kernels without a GPU; write their figures to a file, or check them.

    python -m benchmarks.compile                 # everything, into benchmarks/results/compile.json
    python -m benchmarks.compile --check --hot   # check what training runs by default
    python -m benchmarks.compile count   # instructions, into benchmarks/compile/instructions.json
    python -m benchmarks.compile model   # times predicted from them, into docs/gpu-model.md

With --check the exit status is 1 if a kernel spills more than the file says (or at all, if it is
not in the file), needs more shared memory than the device has, multiplies on sm_90 without wgmma,
or exceeds a ceiling of ceilings.toml on sm_90.
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

from benchmarks.compile import checks, model, tables
from benchmarks.compile.build import build
from benchmarks.compile.launches import CAPABILITIES, HIDDEN, Kind, Launch, launches
from benchmarks.environment import ROOT, environment

FILE = ROOT / "benchmarks" / "results" / "compile.json"
# What training runs; fp32; hidden sizes that end inside a tile; rows not aligned to 16 bytes.
KINDS = [
    Kind(),
    Kind(torch.float32),
    Kind(torch.bfloat16, 99, 99),
    Kind(torch.float32, 99, 99),
    Kind(torch.bfloat16, HIDDEN, HIDDEN + 1),
]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if all compiles and, with --check, nothing is worse than the files say."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", nargs="?", choices=("all", "count", "model"), default="all")
    parser.add_argument("--check", action="store_true", help="compare with the file, do not write")
    parser.add_argument("--hot", action="store_true", help="only what training runs by default")
    parser.add_argument("--target", type=int, choices=CAPABILITIES, help="only this one")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    if options.what == "model":
        tables.write()
        print(tables.document())
        return 0
    targets = [options.target] if options.target else list(CAPABILITIES)
    if options.what == "count":
        kernels = compiled([t for t in targets if t in model.TARGETS], KINDS[:1], hot=True)
        counted = model.counts(kernels, triton.__version__)
        model.COUNTS.write_text(json.dumps(counted, indent=1) + "\n")
        print("\n".join(report(k) for k in kernels))
        return 0
    kernels = compiled(targets, KINDS[:1] if options.hot else KINDS, options.hot)
    if options.check:
        faults = checks.spills(kernels, json.loads(options.file.read_text())["kernels"])
        if options.hot:  # there are no ceilings for a clip, a softcap or statistics
            faults += checks.instructions(kernels) + checks.stale(kernels)
        print("\n".join(faults) or "nothing worse than the files say")
        return int(bool(faults))
    # `count` prints instructions by class; they would make this file ten times as long.
    kept = [{name: v for name, v in k.items() if name != "instructions"} for k in kernels]
    found = {"kind": "compile", "environment": environment(), "kernels": kept}
    options.file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{sum(k['spilled_bytes'] > 0 for k in kernels)} of {len(kernels)} spill: {options.file}")
    print(tables.document())
    return 0


def compiled(targets: list[int], kinds: list[Kind], hot: bool) -> list[dict[str, Any]]:
    """Compile every launch of these kinds of inputs, in as many processes as there are cores."""
    work = [
        (target, kind, launch)
        for target in targets
        for kind in kinds
        for launch in launches(target, kind, hot, scaled=(True,) if hot else (True, False))
    ]
    print(f"{len(work)} compilations with Triton {triton.__version__}", flush=True)
    # The longest first, so that all processes end at about the same time.
    order = sorted(range(len(work)), key=lambda n: -work[n][2].tile)
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        made = list(workers.map(_one, [work[n] for n in order]))
    return [k for _, k in sorted(zip(order, made, strict=True))]


def _one(work: tuple[int, Kind, Launch]) -> dict[str, Any]:
    target, kind, launch = work
    return {"inputs": str(kind), **build(target, launch)}


def report(k: dict[str, Any]) -> str:
    """Resources of a kernel, and its hot loop's instructions per pair, most frequent first."""
    line = (
        f"sm_{k['target']} {k['kernel']} | {k['case']}: {k['registers']} registers, "
        f"{k['shared_bytes']} B shared, {k['spilled_bytes']} B spilled, "
        f"{k['blocks_per_processor']} blocks of {k['warps']} warps a processor"
    )
    if k["product"]:
        line += f"; wgmma in flight {k['product']['waits']}, {k['product']['barriers']} barriers"
    if k["instructions"]:
        each = ", ".join(f"{name} {n}" for name, n in k["instructions"]["each"].items())
        line += f"\n    {k['instructions']['all']} a pair: {each}"
    return line


if __name__ == "__main__":
    sys.exit(main())
