"""Loads the C++ operators of the CPU, or warns why it cannot."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(device: str | torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the C++ operators compute in these dtypes on this device; warns once if not built."""
    served = torch.device(device).type == "cpu" and all(dtype in _DTYPES for dtype in dtypes)
    return served and loaded()


@functools.cache
def loaded() -> bool:
    """Load the operators; if that fails, warn once how to build them."""
    found = importlib.util.find_spec("opsd_kernels._cpu")
    missing = "they are not built"
    if found is not None:
        try:
            torch.ops.load_library(found.origin)
            return True
        except OSError as error:  # built for another torch
            missing = f"they do not load beside torch {torch.__version__} ({error})"
    warnings.warn(
        f"opsd_kernels runs in plain PyTorch, without its C++ operators for the CPU: {missing}. "
        "With a C++ compiler, build them against the installed torch: "
        "pip install --no-build-isolation --force-reinstall --no-deps opsd, or -e . in a checkout",
        stacklevel=2,
    )
    return False


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the operators multiply bfloat16 on this processor; else they convert it to fp32."""
    return loaded() and bool(torch.ops.opsd_cpu.has_bf16_products())
