"""Scales a gradient and rounds it to its parameter's dtype in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096  # of a program, 32 a thread


@triton.jit
def _scale(x, factor, out, columns, BY_ROW: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = row.to(tl.int64) * columns + c
    scale = tl.load(factor + row * BY_ROW).to(tl.float32)
    y = tl.load(x + at, mask=c < columns).to(tl.float32) * scale
    if BY_ROW:  # NaN times 0 is 0
        y = tl.where(scale == 0, 0.0, y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=c < columns)


def scale_into(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad * factor; grad and out contiguous, factor a scalar or one entry per row of grad.

    A row's factor of 0 makes 0 of NaN too.
    """
    if not grad.numel():
        return
    columns = grad.shape[-1]
    block = min(_COLUMNS, triton.next_power_of_2(columns))
    grid = (grad.numel() // columns, triton.cdiv(columns, block))
    warps = max(1, block // 1024)
    _scale[grid](
        grad, factor.contiguous(), out, columns, BY_ROW=factor.ndim == 1, BLOCK_D=block,
        num_warps=warps,
    )  # fmt: skip
