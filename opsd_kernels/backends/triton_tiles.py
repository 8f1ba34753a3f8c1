"""Tiles of logits that a kernel multiplies from hidden states and head on the spot.

A tile is (R, C) fp32: R rows by C vocabulary columns. A row's columns are folded into running
statistics relative to the running maximum, so that tiles, programs and ranks merge alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import BANNED, LOG_ZERO, capped

# Steps over the inner size that an exact fp32 product sums by themselves: the rounding of one long
# sum grows with its length.
_STEPS = tl.constexpr(16)

# ---------------------------------------------------------------------------- where tiles come from


@triton.jit
def operand(
    x, row, k, rows, depth, row_stride, k_stride,
    R: tl.constexpr, K: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(R, K) operand of a product, zero beyond `depth`; rows past the end hold anything finite."""
    if DESCRIBED:
        tile = x.load([row, k])
    else:
        # The last row again instead of a mask: their products are dropped with the tile's edge.
        r = tl.minimum(row + tl.arange(0, R), rows - 1).to(tl.int64)
        c = k + tl.arange(0, K)
        at = x + r[:, None] * row_stride + c[None, :].to(tl.int64) * k_stride
        if EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=c[None, :] < depth, other=0.0)
    return tile


@triton.jit
def product(
    h, w, row, col, rows, cols, depth, h_row, h_k, w_row, w_k,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, C) tile of h @ w.T in fp32."""
    acc = tl.zeros((R, C), tl.float32)
    if PRECISION == "ieee":
        for first in range(0, depth, _STEPS * K):
            acc += _product(
                h, w, row, col, rows, cols, depth, h_row, h_k, w_row, w_k, first,
                tl.minimum(first + _STEPS * K, depth), R, C, K, DESCRIBED, EVEN, PRECISION,
            )  # fmt: skip
    else:
        acc = _product(
            h, w, row, col, rows, cols, depth, h_row, h_k, w_row, w_k, 0, depth,
            R, C, K, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _product(
    h, w, row, col, rows, cols, depth, h_row, h_k, w_row, w_k, first, last,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of it from `first` to `last` of the inner size."""
    acc = tl.zeros((R, C), tl.float32)
    for k in range(first, last, K):
        a = operand(h, row, k, rows, depth, h_row, h_k, R, K, DESCRIBED, EVEN)
        b = operand(w, col, k, cols, depth, w_row, w_k, C, K, DESCRIBED, EVEN)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def shared_products(
    h_s, h_t, w, row, col, rows, cols, depth, s_row, s_k, t_row, t_k, w_row, w_k,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Student's and teacher's tile of one head: each weight tile is loaded once for both."""
    student = tl.zeros((R, C), tl.float32)
    teacher = tl.zeros((R, C), tl.float32)
    if PRECISION == "ieee":
        for first in range(0, depth, _STEPS * K):
            more_s, more_t = _shared_products(
                h_s, h_t, w, row, col, rows, cols, depth, s_row, s_k, t_row, t_k, w_row, w_k,
                first, tl.minimum(first + _STEPS * K, depth), R, C, K, DESCRIBED, EVEN, PRECISION,
            )  # fmt: skip
            student += more_s
            teacher += more_t
    else:
        student, teacher = _shared_products(
            h_s, h_t, w, row, col, rows, cols, depth, s_row, s_k, t_row, t_k, w_row, w_k, 0, depth,
            R, C, K, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
    return student, teacher


@triton.jit
def _shared_products(
    h_s, h_t, w, row, col, rows, cols, depth, s_row, s_k, t_row, t_k, w_row, w_k, first, last,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    student = tl.zeros((R, C), tl.float32)
    teacher = tl.zeros((R, C), tl.float32)
    for k in range(first, last, K):
        b = tl.trans(operand(w, col, k, cols, depth, w_row, w_k, C, K, DESCRIBED, EVEN))
        a = operand(h_s, row, k, rows, depth, s_row, s_k, R, K, DESCRIBED, EVEN)
        student = tl.dot(a, b, student, input_precision=PRECISION)
        a = operand(h_t, row, k, rows, depth, t_row, t_k, R, K, DESCRIBED, EVEN)
        teacher = tl.dot(a, b, teacher, input_precision=PRECISION)
    return student, teacher


@triton.jit
def _half(tile, right: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    first, second = tl.split(tl.permute(tl.reshape(tile, (R, 2, C // 2)), (0, 2, 1)))
    if right:
        first = second
    return first


@triton.jit
def part_of(tile, part: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """(R, C / PARTS) of a tile in 1, 2, 4 or 8 parts, whose row arithmetic fits in registers."""
    if PARTS == 1:
        piece = tile
    elif PARTS == 2:
        piece = _half(tile, part, R, C)
    elif PARTS == 4:
        piece = _half(_half(tile, part // 2, R, C), part % 2, R, C // 2)
    else:
        quarter = _half(_half(tile, part // 4, R, C), part // 2 % 2, R, C // 2)
        piece = _half(quarter, part % 2, R, C // 4)
    return piece


@triton.jit
def finished(raw, col, cols, bias, softcap, inv_temp, C: tl.constexpr):
    """(z, slope): z = softcap(raw + bias) / temperature, and d softcap / d raw.

    Columns past the end and banned entries become LOG_ZERO.
    """
    c = col + tl.arange(0, C)
    slope = 1.0
    if bias is not None:
        raw += tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        raw, slope = capped(raw, softcap)
    # A comparison lets NaN through, where a maximum would hide it.
    z = raw * inv_temp
    z = tl.where(z < LOG_ZERO, LOG_ZERO, z)
    return tl.where((c < cols)[None, :], z, LOG_ZERO), slope


@triton.jit
def risen(z, top):
    """The running maximum after a tile, and how far the old one now lies below it."""
    now = tl.maximum(top, tl.max(z, 1))
    return now, top - now


@triton.jit
def crossed(z_p, z_q):
    """Per row, 1 where p is possible and q banned: there the KL of p from q is infinite."""
    return tl.max(tl.where((z_p > BANNED) & (z_q < BANNED), 1.0, 0.0), 1)
