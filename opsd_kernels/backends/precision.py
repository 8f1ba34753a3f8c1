"""What PyTorch's settings of matrix products allow, and what they refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Words of PyTorch's refusals of fp32 sums of 16-bit products, and what to do about each.
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
    """Whether fp32 products may round their operands to tf32, by either of PyTorch's settings.

    `fp32_precision` is what cuBLAS follows: `allow_tf32` and `set_float32_matmul_precision` write
    it too, and reading it never raises, while reading them does after the newer one was set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextlib.contextmanager
def named_refusals() -> Iterator[None]:
    """Raise a RuntimeError that names the setting where PyTorch refuses a product for it."""
    try:
        yield
    except RuntimeError as error:
        for words, explanation in _REFUSALS.items():
            if words in str(error):
                raise RuntimeError(explanation) from error
        raise
