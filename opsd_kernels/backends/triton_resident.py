"""Statistics, sums and gradient of a pair's rows in one pass over their logits.

A row's programs each take a part of it into registers, tell each other their statistics and then
their sums, and write the gradient over the logits, which nobody needs any more. A program waits
only for programs of its own row, whose numbers are drawn next to its own: whoever it waits for has
started, so all of them go on whatever else runs on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LOG_ZERO,
    divergence_slope,
    entries,
    exp,
    gradient_unit,
    log2,
    log_ratio,
    probability,
)
from opsd_kernels.backends.triton_rows import ROW_NUMBERS, label_logit, row_logits, store_head


@triton.jit
def _meet(arrived, parts):
    """Wait until so many programs have come here; what they stored before is seen after."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < parts:
        pass
    tl.debug_barrier()


@triton.jit(**ROW_NUMBERS)
def resident_divergence(
    z_s, z_t, bias_s, cap_s, inv_temp_s, bias_t, cap_t, inv_temp_t, label, out, sums, shared,
    counters, scale, dz, rows, cols, padded, stride, dz_stride, first, beta, rest,
    BLOCK_V: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr, ENTROPY: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, over z_s.

    out and sums get each part's statistics and sums, as `row_statistics_pair` and
    `row_divergence_sums` give them. shared (rows, 6, ROOM) is what a row's programs tell each
    other; counters (1 + 2 rows) are zero.
    """
    drawn = tl.atomic_add(counters, 1, sem="relaxed")
    row, part = drawn // PARTS, drawn % PARTS
    z_s += row.to(tl.int64) * stride
    z_t += row.to(tl.int64) * stride
    dz += row.to(tl.int64) * dz_stride
    begin = part * BLOCK_V
    c = begin + tl.arange(0, BLOCK_V)
    x_s, slope = row_logits(z_s, c, cols, padded, bias_s, cap_s, inv_temp_s)
    x_t, _ = row_logits(z_t, c, cols, padded, bias_t, cap_t, inv_temp_t)
    top_s, top_t = tl.maximum(tl.max(x_s, 0), LOG_ZERO), tl.maximum(tl.max(x_t, 0), LOG_ZERO)
    u_s, u_t = x_s - top_s, x_t - top_t
    s, t = exp(u_s), exp(u_t)
    total_s, total_t = tl.sum(s, 0), tl.sum(t, 0)
    weighted_s, weighted_t = 0.0, 0.0
    if ENTROPY:
        weighted_s = tl.sum(s * tl.maximum(u_s, LOG_ZERO), 0)
        weighted_t = tl.sum(t * tl.maximum(u_t, LOG_ZERO), 0)
    end = begin + BLOCK_V
    y = begin
    if label is not None:
        y = (tl.load(label + row) - first).to(tl.int32)
    jump = rows.to(tl.int64) * PARTS
    at = out + part.to(tl.int64) * rows + row
    label_s = label_logit(z_s, y, begin, end, cols, bias_s, cap_s, inv_temp_s)
    at = store_head(at, jump, top_s, total_s, weighted_s, label_s, label, ENTROPY)
    label_t = label_logit(z_t, y, begin, end, cols, bias_t, cap_t, inv_temp_t)
    at = store_head(at, jump, top_t, total_t, weighted_t, label_t, label, ENTROPY)
    board = shared + row.to(tl.int64) * (6 * ROOM)
    mine = board + part
    if KIND != JSD:
        if KIND == FORWARD_KL:
            d = x_t - x_s
            cross = t * (tl.clamp(d, LOG_ZERO, -LOG_ZERO) - (top_t - top_s))
        else:
            d = x_s - x_t
            cross = s * (tl.clamp(d, LOG_ZERO, -LOG_ZERO) - (top_s - top_t))
        infinite = tl.where(tl.max(d, 0) > -0.5 * LOG_ZERO, 1.0, 0.0)
        tl.store(at, tl.sum(cross, 0))
        tl.store(at + jump, infinite)
        tl.store(mine + 4 * ROOM, infinite)
    tl.store(mine, top_s)
    tl.store(mine + ROOM, total_s)
    tl.store(mine + 2 * ROOM, top_t)
    tl.store(mine + 3 * ROOM, total_t)
    arrived = counters + 1 + 2 * row
    _meet(arrived, PARTS)
    all = tl.arange(0, ROOM)
    there = all < PARTS
    tops = tl.load(board + all, mask=there, other=LOG_ZERO, cache_modifier=".cg")
    totals = tl.load(board + ROOM + all, mask=there, other=0.0, cache_modifier=".cg")
    top_s = tl.max(tops, 0)
    log2_s = log2(tl.sum(totals * exp(tops - top_s), 0))
    tops = tl.load(board + 2 * ROOM + all, mask=there, other=LOG_ZERO, cache_modifier=".cg")
    totals = tl.load(board + 3 * ROOM + all, mask=there, other=0.0, cache_modifier=".cg")
    top_t = tl.max(tops, 0)
    log2_t = log2(tl.sum(totals * exp(tops - top_t), 0))
    s, t = probability(x_s, top_s, log2_s), probability(x_t, top_t, log2_t)
    d = log_ratio(x_s, x_t, top_s, log2_s, top_t, log2_t)
    total = 1.0
    if KIND != FORWARD_KL:
        entry, share = entries(s, t, d, beta, rest, KIND)
        if KIND == JSD:
            told = tl.sum(share, 0)
            at = sums + part.to(tl.int64) * rows + row
            tl.store(at, tl.sum(entry, 0))
            tl.store(at + jump, told)
        else:
            told = tl.sum(entry, 0)
        tl.store(mine + 5 * ROOM, told)
        _meet(arrived + 1, PARTS)
        total = tl.sum(
            tl.load(board + 5 * ROOM + all, mask=there, other=0.0, cache_modifier=".cg"), 0
        )
    factor = gradient_unit(dz, inv_temp_s)
    if scale is not None:
        factor *= tl.load(scale + row)
    if KIND == JSD:
        grad = rest * (s * total - share)
    else:
        if KIND != FORWARD_KL:
            # Of an infinite reverse KL inf - inf has no direction; the value reports it.
            lost = tl.load(board + 4 * ROOM + all, mask=there, other=0.0, cache_modifier=".cg")
            lost = tl.max(lost, 0)
            factor = tl.where(lost > 0, 0.0, factor)
            total = tl.where(lost > 0, 0.0, total)
        grad = divergence_slope(s, t, d, total, None, beta, rest, KIND)
    tl.store(dz + c, (grad * slope * factor).to(dz.dtype.element_ty), mask=c < padded)
