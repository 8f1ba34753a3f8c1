"""Compile one launch for a target and read what ptxas reports."""

from __future__ import annotations

import importlib
import math
import os
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compile import sass
from benchmarks.compile.launches import Launch

# Per processor: CUDA C++ Programming Guide, table of features by compute capability. Every block
# reserves 1 KiB of shared memory.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_RESERVED = 1024
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
# Registers are allocated to a warp in units of this, and to warps in fours.
_REGISTER_UNIT, _WARP_UNIT = 256, 4
_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "i64": 8}


def build(target: int, launch: Launch) -> dict[str, object]:
    """Resources of a compiled program, and instructions of its hot loop.

    Instruction counts are per pair of logits, or per logit for one head; None for kernels without
    a tile.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    source = ASTSource(
        getattr(importlib.import_module(launch.module), launch.kernel),
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [["tt.divisibility", 16]] for path in launch.aligned},
    )
    options = dict(launch.options)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage = _usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    kinds = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    warps, shared = launch.threads // 32, made.metadata.shared
    code = sass.instructions(sass.cuobjdump(made.asm["cubin"], "-sass"))
    return {
        "target": target,
        "kernel": launch.kernel,
        "case": describe(launch),
        "blocks": "x".join(map(str, launch.blocks)),
        "warps": warps,
        "stages": options.get("num_stages", 3),
        "shared_bytes": shared,
        "registers": usage["REG"],
        # STACK holds spilled registers; LOCAL arrays the kernels do not have.
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "matrix": next((kind for kind in kinds if kind in ptx), None),
        "blocks_per_processor": resident(target, usage["REG"], warps, shared),
        "instructions": _hot(code, made.asm["ttgir"], launch) if launch.tile else None,
        "product": _product(code) if launch.fused else None,
    }


def describe(launch: Launch) -> str:
    """The words that distinguish this launch of a kernel from its others."""
    constants = launch.constant
    words = []
    if launch.tile:
        words = ["streaming" if launch.fused else "blocked"]
    words += [name.lower() for name, v in constants.items() if v is True]
    if "KIND" in constants:
        words.append(("forward kl", "reverse kl", "jsd")[constants["KIND"]])
    # Without _s or _t, and without the tuple that the argument is in.
    given = {
        name.split(".")[-1].removesuffix("_s")
        for name, kind in launch.types.items()
        if kind != "constexpr"
    }
    optional = ("clip", "label", "softcap", "entropy", "scale", "dz_entropy")
    return ", ".join(words + [f"with {name}" for name in optional if name in given])


def resident(target: int, registers: int, warps: int, shared_bytes: int) -> int:
    """Programs that fit on one processor at a time."""
    unit = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // unit // _WARP_UNIT * _WARP_UNIT // warps
    by_shared = (SHARED_BYTES[target] + _RESERVED) // (shared_bytes + _RESERVED)
    return min(by_registers, _WARPS // warps, by_shared, _BLOCKS)


def _hot(code: list[sass.Instruction], ttgir: str, launch: Launch) -> dict[str, object]:
    hot = sass.hot(code)
    tile = launch.tile
    # If the compiler unrolled the loop, an iteration loads several tiles of the source.
    asked = sum(size for elements, size in _loads(ttgir) if tile // 8 <= elements <= tile)
    times = max(1, round(sass.loaded(hot) * launch.threads / asked)) if asked else 1
    pairs = times * tile / launch.threads
    number = sass.count(hot)
    each = {name: round(n / pairs, 3) for name, n in number.items()}
    return {
        "all": round(len(hot) / pairs, 2),
        "special": round(sum(n for name, n in each.items() if name.startswith("MUFU")), 2),
        "rcp": each.get("MUFU.RCP", 0.0),
        "logf": round(sass.logarithms(hot) / pairs, 3),
        "narrow": round(sass.narrow(hot) / pairs, 3),
        "local": number.get("LDL", 0) + number.get("STL", 0),
        "pairs": pairs,
        "each": each,
    }


def _loads(ttgir: str) -> list[tuple[int, int]]:
    """(elements, bytes) of every load of a tile."""
    found = re.findall(r"tt\.load .*: tensor<([\dx]+)x!tt\.ptr<(\w+)>", ttgir)
    sizes = [(math.prod(map(int, shape.split("x"))), _BYTES[kind]) for shape, kind in found]
    return [(elements, elements * each) for elements, each in sizes]


def _product(code: list[sass.Instruction]) -> dict[str, object]:
    """Groups of wgmma in flight at the waits of a step over the inner size, and its barriers."""
    steps = [i for loop in sass.product_loops(code) for i in loop]
    return {"waits": sass.waits(steps), "barriers": sum(i.base == "BAR" for i in steps)}


def _usage(cubin: bytes) -> dict[str, int]:
    text = sass.cuobjdump(cubin, "-res-usage")
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"STACK": 0, "LOCAL": 0, **found}
