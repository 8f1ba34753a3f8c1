"""Compiles one launch for a target and reads what ptxas gave it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compile.launches import Launch
from opsd_kernels.backends import triton_gradients, triton_kernels

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def build(target: int, launch: Launch) -> dict[str, object]:
    """Shared memory, registers, spilled bytes and kind of matrix instruction of a launch."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    module = triton_kernels if hasattr(triton_kernels, launch.kernel) else triton_gradients
    source = ASTSource(
        getattr(module, launch.kernel),
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    options = dict(launch.options)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage = _usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    kinds = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    return {
        "target": target,
        "kernel": launch.kernel,
        "case": describe(launch),
        "blocks": launch.blocks,
        "warps": options.get("num_warps", 4),
        "stages": options.get("num_stages", 3),
        "shared_bytes": made.metadata.shared,
        "registers": usage["REG"],
        # STACK holds spilled registers; LOCAL arrays the kernels do not have.
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "matrix": next((kind for kind in kinds if kind in ptx), None),
    }


def describe(launch: Launch) -> str:
    """What tells this launch of a kernel from the others."""
    constants, signature = dict(launch.constants), dict(launch.signature)
    words = []
    if "FUSED" in constants:
        words = ["streaming" if constants["FUSED"] else "blocked"]
    flags = ("SHARED", "DESCRIBED", "EVEN", "ENTROPY", "SMOOTHED", "LABEL")
    words += [name.lower() for name in flags if constants.get(name)]
    if "KIND" in constants:
        words.append(("forward kl", "reverse kl", "jsd")[constants["KIND"]])
    optional = ("clip", "label", "cap_s", "softcap", "entropy", "scale", "grad_entropy")
    words += [
        f"with {name}" for name in optional if signature.get(name, "constexpr") != "constexpr"
    ]
    return ", ".join(words)


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"STACK": 0, "LOCAL": 0, **found}
