"""Tiles of logits that the fused kernels multiply from hidden states and head weight.

A tile is (BLOCK_N, BLOCK_V) fp32: BLOCK_N rows by BLOCK_V vocabulary columns, summed over the inner
size in steps of BLOCK_D. A row's statistics are kept relative to its running maximum, so those of
tiles, programs and ranks merge in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import BANNED, LOG_ZERO, apply_softcap

# Steps over the inner size that an exact fp32 product adds up separately: the rounding error of one
# long sum grows with its length.
_EXACT_STEPS = tl.constexpr(16)


class MatmulSizes(NamedTuple):
    """Inner size and element strides of x (N, D) @ w (V, D).T, as one kernel argument."""

    depth: int  # D
    x_stride_n: int
    x_stride_d: int
    w_stride_v: int
    w_stride_d: int


# -------------------------------------------------------------------------------------- the product


@triton.jit
def load_operand(
    x, start_row, start_d, rows, depth, row_stride, d_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_ROWS, BLOCK_D) of x, zero beyond `depth`; rows past the end hold anything finite.

    With USE_TMA x is a tensor descriptor. EVEN_D: depth is a multiple of BLOCK_D, no mask needed.
    """
    if USE_TMA:
        b_x = x.load([start_row, start_d])
    else:
        # The last row again instead of a mask: the caller drops these rows at the tile's edge.
        o_row = tl.minimum(start_row + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
        o_d = start_d + tl.arange(0, BLOCK_D)
        p_x = x + o_row[:, None] * row_stride + o_d[None, :].to(tl.int64) * d_stride
        if EVEN_D:
            b_x = tl.load(p_x)
        else:
            b_x = tl.load(p_x, mask=o_d[None, :] < depth, other=0.0)
    return b_x


@triton.jit
def matmul_tile(
    x, w, sizes, start_n, start_v, rows, cols,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) tile of x @ w.T in fp32."""
    b_raw = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if PRECISION == "ieee":
        for first in range(0, sizes.depth, _EXACT_STEPS * BLOCK_D):
            b_raw += _matmul_steps(
                x, w, sizes, start_n, start_v, rows, cols, first,
                tl.minimum(first + _EXACT_STEPS * BLOCK_D, sizes.depth),
                BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
            )  # fmt: skip
    else:
        b_raw = _matmul_steps(
            x, w, sizes, start_n, start_v, rows, cols, 0, sizes.depth,
            BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
    return b_raw


@triton.jit
def _matmul_steps(
    x, w, sizes, start_n, start_v, rows, cols, first, last,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product summed over the inner size from `first` to `last`."""
    b_raw = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start_d in range(first, last, BLOCK_D):
        b_x = load_operand(
            x, start_n, start_d, rows, sizes.depth, sizes.x_stride_n, sizes.x_stride_d,
            BLOCK_N, BLOCK_D, USE_TMA, EVEN_D,
        )  # fmt: skip
        b_w = load_operand(
            w, start_v, start_d, cols, sizes.depth, sizes.w_stride_v, sizes.w_stride_d,
            BLOCK_V, BLOCK_D, USE_TMA, EVEN_D,
        )  # fmt: skip
        b_raw = tl.dot(b_x, tl.trans(b_w), b_raw, input_precision=PRECISION)
    return b_raw


@triton.jit
def matmul_tile_pair(
    x_s, w_s, sizes_s, x_t, w_t, sizes_t, start_n, start_v, rows, cols,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SHARED: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) tiles of raw logits of student and teacher.

    SHARED: both models use w_s, and each tile of it is loaded once for both.
    """
    if SHARED:
        b_raw_s, b_raw_t = _matmul_shared(
            x_s, x_t, w_s, sizes_s, sizes_t, start_n, start_v, rows, cols,
            BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
    else:
        b_raw_s = matmul_tile(
            x_s, w_s, sizes_s, start_n, start_v, rows, cols,
            BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
        b_raw_t = matmul_tile(
            x_t, w_t, sizes_t, start_n, start_v, rows, cols,
            BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
    return b_raw_s, b_raw_t


@triton.jit
def _matmul_shared(
    x_s, x_t, w, sizes_s, sizes_t, start_n, start_v, rows, cols,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_raw_s = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    b_raw_t = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if PRECISION == "ieee":
        for first in range(0, sizes_s.depth, _EXACT_STEPS * BLOCK_D):
            b_part_s, b_part_t = _matmul_shared_steps(
                x_s, x_t, w, sizes_s, sizes_t, start_n, start_v, rows, cols, first,
                tl.minimum(first + _EXACT_STEPS * BLOCK_D, sizes_s.depth),
                BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
            )  # fmt: skip
            b_raw_s += b_part_s
            b_raw_t += b_part_t
    else:
        b_raw_s, b_raw_t = _matmul_shared_steps(
            x_s, x_t, w, sizes_s, sizes_t, start_n, start_v, rows, cols, 0, sizes_s.depth,
            BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
    return b_raw_s, b_raw_t


@triton.jit
def _matmul_shared_steps(
    x_s, x_t, w, sizes_s, sizes_t, start_n, start_v, rows, cols, first, last,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_raw_s = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    b_raw_t = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start_d in range(first, last, BLOCK_D):
        b_w = load_operand(
            w, start_v, start_d, cols, sizes_s.depth, sizes_s.w_stride_v, sizes_s.w_stride_d,
            BLOCK_V, BLOCK_D, USE_TMA, EVEN_D,
        )  # fmt: skip
        b_w = tl.trans(b_w)
        b_x = load_operand(
            x_s, start_n, start_d, rows, sizes_s.depth, sizes_s.x_stride_n, sizes_s.x_stride_d,
            BLOCK_N, BLOCK_D, USE_TMA, EVEN_D,
        )  # fmt: skip
        b_raw_s = tl.dot(b_x, b_w, b_raw_s, input_precision=PRECISION)
        b_x = load_operand(
            x_t, start_n, start_d, rows, sizes_s.depth, sizes_t.x_stride_n, sizes_t.x_stride_d,
            BLOCK_N, BLOCK_D, USE_TMA, EVEN_D,
        )  # fmt: skip
        b_raw_t = tl.dot(b_x, b_w, b_raw_t, input_precision=PRECISION)
    return b_raw_s, b_raw_t


# ------------------------------------------------------------------------- what follows the product


@triton.jit
def _half(b_x, right: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Left or right half of the columns."""
    half, b_right = tl.split(tl.permute(tl.reshape(b_x, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))
    if right:
        half = b_right
    return half


@triton.jit
def column_part(
    b_x, i_part: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """(BLOCK_N, BLOCK_V / PARTS): one of 1, 2, 4 or 8 parts of a tile's columns.

    The row math of a part fits in registers where that of a whole tile would spill.
    """
    if PARTS == 1:
        b_part = b_x
    elif PARTS == 2:
        b_part = _half(b_x, i_part, BLOCK_N, BLOCK_V)
    elif PARTS == 4:
        b_half = _half(b_x, i_part // 2, BLOCK_N, BLOCK_V)
        b_part = _half(b_half, i_part % 2, BLOCK_N, BLOCK_V // 2)
    else:
        b_half = _half(b_x, i_part // 4, BLOCK_N, BLOCK_V)
        b_quarter = _half(b_half, i_part // 2 % 2, BLOCK_N, BLOCK_V // 2)
        b_part = _half(b_quarter, i_part % 2, BLOCK_N, BLOCK_V // 4)
    return b_part


@triton.jit
def apply_bias_cap_temperature(b_raw, start_v, cols, epilogue, BLOCK_V: tl.constexpr):
    """(z, slope): z = softcap(raw + bias) / temperature, and slope = d softcap / d raw.

    Columns past the end and banned entries become LOG_ZERO.
    """
    o_v = start_v + tl.arange(0, BLOCK_V)
    slope = 1.0
    if epilogue.bias is not None:
        b_raw += tl.load(epilogue.bias + o_v, mask=o_v < cols, other=0.0).to(tl.float32)[None, :]
    if epilogue.softcap is not None:
        b_raw, slope = apply_softcap(b_raw, epilogue.softcap)
    # A comparison lets NaN through, where a maximum would hide it.
    b_z = b_raw * epilogue.inv_temp
    b_z = tl.where(b_z < LOG_ZERO, LOG_ZERO, b_z)
    return tl.where((o_v < cols)[None, :], b_z, LOG_ZERO), slope


@triton.jit
def update_max(b_z, row_max):
    """(running maximum after this tile, old maximum - new maximum)."""
    new_max = tl.maximum(row_max, tl.max(b_z, 1))
    return new_max, row_max - new_max


@triton.jit
def has_infinite_kl(b_z_p, b_z_q):
    """Per row 1 if a column is possible under p and banned under q: KL(p || q) is infinite."""
    return tl.max(tl.where((b_z_p > BANNED) & (b_z_q < BANNED), 1.0, 0.0), 1)
