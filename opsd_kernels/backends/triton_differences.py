"""Kernels on 16-bit differences of a pair's logits, in place of the fp32 logits themselves.

A tile of BLOCK_V columns is known by its maxima, which its statistics hold in fp32. Relative to
them u_s and u_t are at most 0, and two fp16 numbers keep a column: the larger of u_s and u_t, and
the gap u_t - u_s. A probability loses what fp16 loses near the tile's maximum, where it matters
least; a close pair keeps its digits, because the gap itself is stored. Where one side is banned the
gap is infinite and the larger is the other side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LN_2,
    LOG2_E,
    LOG_ZERO,
    divergence_slope,
    entries,
    exp,
    gradient_unit,
)
from opsd_kernels.backends.triton_rows import (
    ROW_NUMBERS,
    by_lane,
    label_logit,
    lane_sum,
    row_constants,
    row_logits,
    store_head,
)

HOW = {
    "do_not_specialize": [*ROW_NUMBERS["do_not_specialize"], "tile", "tiles"],
    "do_not_specialize_on_alignment": [
        *ROW_NUMBERS["do_not_specialize_on_alignment"], "parts",
    ],
}  # fmt: skip


@triton.jit(**HOW)
def difference_statistics(
    z_s, z_t, bias_s, cap_s, inv_temp_s, bias_t, cap_t, inv_temp_t, label, parts, larger, gap, rows,
    cols, padded, stride, code_stride, first, tile, tiles,
    BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Statistics of one tile of a row, as `row_statistics_pair` has them, and its differences.

    `tile` is the slice's first of the vocabulary's `tiles`.
    """
    row, local = tl.program_id(0) % rows, tl.program_id(0) // rows
    z_s += row.to(tl.int64) * stride
    z_t += row.to(tl.int64) * stride
    begin = local * BLOCK_V
    c = begin + tl.arange(0, BLOCK_V)
    x_s, _ = row_logits(z_s, c, cols, padded, bias_s, cap_s, inv_temp_s)
    x_t, _ = row_logits(z_t, c, cols, padded, bias_t, cap_t, inv_temp_t)
    top_s, top_t = tl.maximum(tl.max(x_s, 0), LOG_ZERO), tl.maximum(tl.max(x_t, 0), LOG_ZERO)
    u_s, u_t = x_s - top_s, x_t - top_t
    d = (x_t - x_s) - (top_t - top_s)
    d = tl.where(d == d, d, float("-inf"))  # both banned
    code = row.to(tl.int64) * code_stride + tile * BLOCK_V + c
    tl.store(larger + code, tl.where(d > 0, u_t, u_s).to(tl.float16), mask=c < padded)
    tl.store(gap + code, d.to(tl.float16), mask=c < padded)
    s, t = exp(u_s), exp(u_t)
    u_s, u_t = tl.maximum(u_s, LOG_ZERO), tl.maximum(u_t, LOG_ZERO)
    y, end = begin, begin + BLOCK_V
    if label is not None:
        y = (tl.load(label + row) - first).to(tl.int32)
    jump = tiles.to(tl.int64) * rows
    at = parts + (tile + local).to(tl.int64) * rows + row
    label_s = label_logit(z_s, y, begin, end, cols, bias_s, cap_s, inv_temp_s)
    at = store_head(
        at, jump, top_s, tl.sum(s, 0), tl.sum(s * u_s, 0), label_s, label, ENTROPY
    )  # fmt: skip
    label_t = label_logit(z_t, y, begin, end, cols, bias_t, cap_t, inv_temp_t)
    at = store_head(
        at, jump, top_t, tl.sum(t, 0), tl.sum(t * u_t, 0), label_t, label, ENTROPY
    )  # fmt: skip
    if KIND != JSD:
        if KIND == FORWARD_KL:
            cross, lost = t * tl.clamp(d, LOG_ZERO, -LOG_ZERO), x_t - x_s
        else:
            cross, lost = s * tl.clamp(-d, LOG_ZERO, -LOG_ZERO), x_s - x_t
        tl.store(at, tl.sum(cross, 0))
        tl.store(at + jump, tl.where(tl.max(lost, 0) > -0.5 * LOG_ZERO, 1.0, 0.0))


@triton.jit
def _terms(
    larger, gap, parts, at, row, rows, tile, tiles, top_s, log2_s, top_t, log2_t, inside,
    STEP: tl.constexpr,
):  # fmt: skip
    """(s, t, log(t / s), z_s) of a tile from its differences and its own maxima in `parts`."""
    own = parts + tile * rows + row
    own_s = tl.load(own)
    own_t = tl.load(own + STEP * tiles.to(tl.int64) * rows)
    v = tl.load(larger + at, mask=inside, other=float("-inf")).to(tl.float32)
    d = tl.load(gap + at, mask=inside, other=float("-inf")).to(tl.float32)
    u_s, u_t = v - tl.maximum(d, 0.0), v + tl.minimum(d, 0.0)
    s = tl.exp2(u_s * LOG2_E + ((own_s - top_s) * LOG2_E - log2_s))
    t = tl.exp2(u_t * LOG2_E + ((own_t - top_t) * LOG2_E - log2_t))
    d += ((own_t - own_s) - (top_t - top_s)) - (log2_t - log2_s) * LN_2
    return s, t, d, u_s + own_s


@triton.jit(**HOW)
def difference_sums(
    larger, gap, parts, merged, out, rows, padded, code_stride, width, beta, rest, span, splits,
    tiles,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Value, sum of what K is made of, and sum of s, over a span of a row's tiles."""
    row, split = tl.program_id(0) % rows, tl.program_id(0) // rows
    larger += row.to(tl.int64) * code_stride
    gap += row.to(tl.int64) * code_stride
    top_s, log2_s, top_t, log2_t = row_constants(merged, row, width, STEP)
    value = tl.zeros((LANES,), tl.float32)
    shares = tl.zeros((LANES,), tl.float32)
    chances = tl.zeros((LANES,), tl.float32)
    for tile in range(split * span, tl.minimum(split * span + span, tiles)):
        c = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        s, t, d, _ = _terms(
            larger, gap, parts, c, row, rows, tile, tiles, top_s, log2_s, top_t, log2_t,
            c < padded, STEP,
        )  # fmt: skip
        entry, share = entries(s, t, d, beta, rest, KIND)
        if KIND != JSD:
            share = entry
        value += lane_sum(by_lane(entry, LANES, 8))
        shares += lane_sum(by_lane(share, LANES, 8))
        chances += lane_sum(by_lane(s, LANES, 8))
    at = out + split.to(tl.int64) * rows + row
    jump = splits.to(tl.int64) * rows
    tl.store(at, tl.sum(value, 0))
    tl.store(at + jump, tl.sum(shares, 0))
    tl.store(at + 2 * jump, tl.sum(chances, 0))


@triton.jit(**HOW)
def difference_gradient(
    larger, gap, parts, cap_s, inv_temp_s, merged, totals, scale, dz, rows, padded, code_stride,
    width, beta, rest, span, tiles,
    BLOCK_V: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, in place of `larger`."""
    row, split = tl.program_id(0) % rows, tl.program_id(0) // rows
    at = row.to(tl.int64) * code_stride
    top_s, log2_s, top_t, log2_t = row_constants(merged, row, width, STEP)
    total = tl.load(totals + row)
    factor = gradient_unit(dz, inv_temp_s)
    if scale is not None:
        factor *= tl.load(scale + row)
    if KIND != FORWARD_KL:
        # Of an infinite reverse KL inf - inf has no direction; the value reports it.
        factor = tl.where(total == float("inf"), 0.0, factor)
        total = tl.where(total == float("inf"), 0.0, total)
    for tile in range(split * span, tl.minimum(split * span + span, tiles)):
        c = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        s, t, d, z = _terms(
            larger, gap, parts, at + c, row, rows, tile, tiles, top_s, log2_s, top_t, log2_t,
            c < padded, STEP,
        )  # fmt: skip
        grad = divergence_slope(s, t, d, total, None, beta, rest, KIND) * factor
        if cap_s is not None:
            height = z * (1.0 / (inv_temp_s * cap_s))
            grad *= tl.where(s > 0, 1.0 - height * height, 0.0)
        tl.store(dz + at + c, grad.to(dz.dtype.element_ty), mask=c < padded)
