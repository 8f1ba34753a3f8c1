"""Faults: what is worse than the committed files allow, one sentence each."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import triton

from benchmarks.compile import model
from benchmarks.compile.build import SHARED_BYTES

CEILINGS = Path(__file__).with_name("ceilings.toml")
CEILINGS_TARGET = 90


def spills(kernels: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[str]:
    """More spilled bytes than in `known`, too much shared memory, products without wgmma."""
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


def instructions(kernels: list[dict[str, Any]]) -> list[str]:
    """Kernels above their ceilings, and row kernels without ceilings."""
    ceilings = tomllib.loads(CEILINGS.read_text())
    faults = []
    for k in kernels:
        found, name = k["instructions"], k["kernel"].removeprefix("row_")
        if found is None or k["target"] != CEILINGS_TARGET or not k["case"].startswith("blocked"):
            continue
        if name not in ceilings:
            faults.append(f"{_name(k)}: no ceilings, add [{name}] to {CEILINGS.name}")
            continue
        for what, most in ceilings[name].items():
            if found[what] > most:
                faults.append(f"{_name(k)}: {what} {found[what]} a pair, allowed {most}")
    return faults


def stale(kernels: list[dict[str, Any]]) -> list[str]:
    """Kernels whose instruction counts differ from those of the time model."""
    known = model.counted()
    if triton.__version__ != known["triton"]:
        return []
    found = [k for k in kernels if k["target"] in model.TARGETS]
    made = model.counts(found, triton.__version__)["kernels"]
    return [
        f"sm_{k['target']} {k['kernel']} {k['case']}: {k['all']} instructions a pair are not in "
        f"{model.COUNTS.name}; run `python -m benchmarks.compile count`"
        for k in made
        if k not in known["kernels"]
    ]


def _name(k: dict[str, Any]) -> str:
    return f"sm_{k['target']} {k['inputs']} {k['kernel']} {k['case']}"
