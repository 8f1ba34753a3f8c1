"""PyTorch's global settings of matrix products: tf32, and those that refuse our products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Part of PyTorch's message when it refuses fp32 sums of 16-bit products, and the error we raise.
_REFUSALS = {
    "Tunable GEMM is not supported": (
        "torch.cuda.tunable: cannot tune products of 16-bit inputs with fp32 sums; call "
        "torch.cuda.tunable.enable(False) around the loss, or set DISABLE_ADDMM_CUDA_LT=1"
    ),
    "not supported with allowFP16AccumulationCuBLAS": (
        "torch.backends.cuda.matmul.allow_fp16_accumulation: refuses products of float16 inputs "
        "with fp32 sums; set it to False around the loss, or pass bfloat16"
    ),
}


def tf32_allowed() -> bool:
    """Whether fp32 products may round their operands to tf32.

    cuBLAS follows `fp32_precision`, which the older `allow_tf32` and
    `set_float32_matmul_precision` also write. Reading the older ones raises once it has been set.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@contextlib.contextmanager
def named_refusals() -> Iterator[None]:
    """Where PyTorch refuses a product, raise a RuntimeError that names the setting and the fix."""
    try:
        yield
    except RuntimeError as error:
        for message, explanation in _REFUSALS.items():
            if message in str(error):
                raise RuntimeError(explanation) from error
        raise
