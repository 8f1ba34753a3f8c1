"""Scale a gradient and round it to its parameter's dtype in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096  # of a program: 32 per thread


@triton.jit
def _scale(
    grad,  # (rows, columns), contiguous
    factor,  # (rows,) if BY_ROW, else one element
    out,  # (rows, columns), contiguous
    columns,
    BY_ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_grad = i_n.to(tl.int64) * columns + o_d
    scale = tl.load(factor + i_n * BY_ROW).to(tl.float32)
    b_grad = tl.load(grad + o_grad, mask=o_d < columns).to(tl.float32) * scale
    if BY_ROW:  # a factor of 0 makes 0 of NaN
        b_grad = tl.where(scale == 0, 0.0, b_grad)
    tl.store(out + o_grad, b_grad.to(out.dtype.element_ty), mask=o_d < columns)


def scale_into(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad * factor, rounded to the dtype of `out`.

    grad and out (..., D) are contiguous; factor is a scalar tensor or has one entry per row of
    grad. A row whose factor is 0 becomes 0 even where grad is NaN.
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
