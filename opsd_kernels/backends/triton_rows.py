"""Kernels over rows of logits that a GEMM left in memory: statistics of rows, sums of a divergence.

A program owns one row and a span of the vocabulary, and walks it BLOCK_V columns at a time. A
thread keeps statistics of the columns it loads, 4 at a time, and the threads meet once, at the end.
Rows start on 64-element boundaries and are -inf beyond the vocabulary up to `padded` columns, so
loads are whole vectors whatever the vocabulary is.

Statistics are rows of float32 in the order of `passes.Layout`, one of each per span, for `merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LOG_ZERO,
    capped,
    class_weights,
    entries,
    exp,
    log2,
    log_ratio,
    probability,
)

# Numbers that change from call to call; a kernel compiled again for each would cost seconds.
ROW_NUMBERS = {
    "do_not_specialize": ["cols", "first", "rows", "width", "span", "splits"],
    "do_not_specialize_on_alignment": [
        "label",
        "scale",
        "out",
        "merged",
        "totals",
        "entropy",
        "center",
    ],
}


@triton.jit
def row_logits(z, c, cols, padded, bias, softcap, inv_temp):
    """(z, slope) of one row's columns c: softcap(z + bias) / temperature, d softcap / d raw."""
    raw = tl.load(z + c, mask=c < padded, other=float("-inf"))
    slope = 1.0
    if bias is not None:
        raw += tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)
    if softcap is not None:
        raw, slope = capped(raw, softcap)
        raw = tl.where(c < cols, raw, float("-inf"))
    return raw * inv_temp, slope


@triton.jit
def label_logit(z, y, begin, end, cols, bias, softcap, inv_temp):
    """The logit of column y if it lies in [begin, end) and the vocabulary, else 0."""
    inside = (y >= begin) & (y < tl.minimum(end, cols))
    at = tl.where(inside, y, begin)
    found, _ = row_logits(z, at, cols, cols, bias, softcap, inv_temp)
    return tl.where(inside, found, 0.0)


@triton.jit
def by_lane(x, LANES: tl.constexpr, EACH: tl.constexpr = 4):
    """(BLOCK_V,) as (steps, LANES, EACH): what one thread loads at a time stands in one lane."""
    return tl.reshape(x, (x.shape[0] // (EACH * LANES), LANES, EACH))


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def lane_min(x):
    return tl.min(tl.min(x, 2), 0)


@triton.jit
def across(top, total, weighted):
    """One (top, total, weighted) of the lanes' own: weighted is sum p u, u relative to top."""
    row_top = tl.max(top, 0)
    shift = top - row_top
    shrink = exp(shift)
    return (
        row_top, tl.sum(total * shrink, 0), tl.sum((weighted + shift * total) * shrink, 0),
    )  # fmt: skip


@triton.jit
def _span(rows, span, splits, padded, BLOCK_V: tl.constexpr):
    """(row, split, first and last column) of this program."""
    row, split = tl.program_id(0) % rows, tl.program_id(0) // rows
    begin = split * span * BLOCK_V
    return row, split, begin, tl.minimum(begin + span * BLOCK_V, padded)


# --------------------------------------------------------------------------------------- first pass


@triton.jit(**ROW_NUMBERS)
def row_statistics(
    z, bias, softcap, inv_temp, class_weight, label, out, rows, cols, padded, stride, first, span,
    splits,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr,
    PREDICTED: tl.constexpr,
):  # fmt: skip
    """Statistics of one head over this program's span of a row."""
    row, split, begin, end = _span(rows, span, splits, padded, BLOCK_V)
    z += row.to(tl.int64) * stride
    top = tl.full((LANES,), LOG_ZERO, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    plain = tl.zeros((LANES,), tl.float32)
    number = tl.zeros((LANES,), tl.float32)
    best = tl.full((LANES,), float("inf"), tl.float32)
    for col in range(begin, end, BLOCK_V):
        c = col + tl.arange(0, BLOCK_V)
        x, _ = row_logits(z, c, cols, padded, bias, softcap, inv_temp)
        x = by_lane(x, LANES)
        now = tl.maximum(top, lane_max(x))
        if PREDICTED:
            at_top = x == now[None, :, None]
            found = lane_min(tl.where(at_top, by_lane(c.to(tl.float32), LANES), float("inf")))
            best = tl.where(now > top, found, best)
        shift = top - now
        shrink = exp(shift)
        u = x - now[None, :, None]
        p = exp(u)
        if ENTROPY or SMOOTHED:
            u = tl.maximum(u, LOG_ZERO)
        if ENTROPY:
            weighted = (weighted + shift * total) * shrink + lane_sum(p * u)
        if SMOOTHED:
            w = by_lane(class_weights(class_weight, c, cols), LANES)
            plain += shift * number + lane_sum(u * w)
            number += lane_sum(w)
        total = total * shrink + lane_sum(p)
        top = now
    row_top, row_total, row_weighted = across(top, total, weighted)
    stride = splits.to(tl.int64) * rows
    at = out + split.to(tl.int64) * rows + row
    tl.store(at, row_top)
    tl.store(at + stride, row_total)
    at += 2 * stride
    if ENTROPY:
        tl.store(at, row_weighted)
        at += stride
    if SMOOTHED:
        tl.store(at, tl.sum(plain + (top - row_top) * number, 0))
        tl.store(at + stride, tl.sum(number, 0))
        at += 2 * stride
    if label is not None:
        y = tl.load(label + row) - first
        tl.store(at, label_logit(z, y, begin, end, cols, bias, softcap, inv_temp))
        at += stride
    if PREDICTED:
        tl.store(at, tl.min(tl.where(top == row_top, best, float("inf")), 0) + first)


@triton.jit(**ROW_NUMBERS)
def row_statistics_pair(
    z_s, z_t, bias_s, cap_s, inv_temp_s, bias_t, cap_t, inv_temp_t, label, out, rows, cols, padded,
    stride, first, span, splits,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Statistics of both heads; for a KL also sum p (u_p - u_q), which makes its value."""
    row, split, begin, end = _span(rows, span, splits, padded, BLOCK_V)
    z_s += row.to(tl.int64) * stride
    z_t += row.to(tl.int64) * stride
    top_s = tl.full((LANES,), LOG_ZERO, tl.float32)
    top_t = tl.full((LANES,), LOG_ZERO, tl.float32)
    total_s = tl.zeros((LANES,), tl.float32)
    total_t = tl.zeros((LANES,), tl.float32)
    weighted_s = tl.zeros((LANES,), tl.float32)
    weighted_t = tl.zeros((LANES,), tl.float32)
    cross = tl.zeros((LANES,), tl.float32)
    largest = tl.full((LANES,), LOG_ZERO, tl.float32)
    for col in range(begin, end, BLOCK_V):
        c = col + tl.arange(0, BLOCK_V)
        x_s, _ = row_logits(z_s, c, cols, padded, bias_s, cap_s, inv_temp_s)
        x_t, _ = row_logits(z_t, c, cols, padded, bias_t, cap_t, inv_temp_t)
        x_s, x_t = by_lane(x_s, LANES), by_lane(x_t, LANES)
        now_s, now_t = tl.maximum(top_s, lane_max(x_s)), tl.maximum(top_t, lane_max(x_t))
        shift_s, shift_t = top_s - now_s, top_t - now_t
        shrink_s, shrink_t = exp(shift_s), exp(shift_t)
        u_s, u_t = x_s - now_s[None, :, None], x_t - now_t[None, :, None]
        s, t = exp(u_s), exp(u_t)
        # log(p / q) but for the row's constants; p possible where q is banned makes it infinite.
        if KIND == FORWARD_KL:
            d = x_t - x_s
            largest = tl.maximum(largest, lane_max(d))
            d = tl.clamp(d, LOG_ZERO, -LOG_ZERO) - (now_t - now_s)[None, :, None]
            cross = (cross + (shift_t - shift_s) * total_t) * shrink_t + lane_sum(t * d)
        elif KIND != JSD:
            d = x_s - x_t
            largest = tl.maximum(largest, lane_max(d))
            d = tl.clamp(d, LOG_ZERO, -LOG_ZERO) - (now_s - now_t)[None, :, None]
            cross = (cross + (shift_s - shift_t) * total_s) * shrink_s + lane_sum(s * d)
        if ENTROPY:
            u_s, u_t = tl.maximum(u_s, LOG_ZERO), tl.maximum(u_t, LOG_ZERO)
            weighted_s = (weighted_s + shift_s * total_s) * shrink_s + lane_sum(s * u_s)
            weighted_t = (weighted_t + shift_t * total_t) * shrink_t + lane_sum(t * u_t)
        total_s = total_s * shrink_s + lane_sum(s)
        total_t = total_t * shrink_t + lane_sum(t)
        top_s, top_t = now_s, now_t
    row_top_s, row_total_s, row_weighted_s = across(top_s, total_s, weighted_s)
    row_top_t, row_total_t, row_weighted_t = across(top_t, total_t, weighted_t)
    y = begin
    if label is not None:
        y = (tl.load(label + row) - first).to(tl.int32)
    jump = splits.to(tl.int64) * rows
    at = out + split.to(tl.int64) * rows + row
    label_s = label_logit(z_s, y, begin, end, cols, bias_s, cap_s, inv_temp_s)
    at = store_head(at, jump, row_top_s, row_total_s, row_weighted_s, label_s, label, ENTROPY)
    label_t = label_logit(z_t, y, begin, end, cols, bias_t, cap_t, inv_temp_t)
    at = store_head(at, jump, row_top_t, row_total_t, row_weighted_t, label_t, label, ENTROPY)
    if KIND != JSD:
        ahead = (top_s - row_top_s) - (top_t - row_top_t)
        if KIND == FORWARD_KL:
            cross = (cross - ahead * total_t) * exp(top_t - row_top_t)
        else:
            cross = (cross + ahead * total_s) * exp(top_s - row_top_s)
        tl.store(at, tl.sum(cross, 0))
        tl.store(at + jump, tl.where(tl.max(largest, 0) > -0.5 * LOG_ZERO, 1.0, 0.0))


@triton.jit
def store_head(at, jump, top, total, weighted, picked, label, ENTROPY: tl.constexpr):
    tl.store(at, top)
    tl.store(at + jump, total)
    at += 2 * jump
    if ENTROPY:
        tl.store(at, weighted)
        at += jump
    if label is not None:
        tl.store(at, picked)
        at += jump
    return at


# -------------------------------------------------------------------------------------- second pass


@triton.jit
def row_constants(merged, row, rows, STEP: tl.constexpr):
    """Maximum and log2 of the sum of both heads; the teacher's stand STEP statistics later."""
    at = merged + row
    other = at + STEP * rows.to(tl.int64)
    top_s, top_t = tl.load(at), tl.load(other)
    return top_s, log2(tl.load(at + rows)), top_t, log2(tl.load(other + rows))


@triton.jit(**ROW_NUMBERS)
def row_divergence_sums(
    z_s, z_t, bias_s, cap_s, inv_temp_s, bias_t, cap_t, inv_temp_t, merged, out, rows, cols, padded,
    stride, width, beta, rest, clip, span, splits,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Value, sum of shares and, with a clip, value without it, over a span of a row."""
    row, split, begin, end = _span(rows, span, splits, padded, BLOCK_V)
    z_s += row.to(tl.int64) * stride
    z_t += row.to(tl.int64) * stride
    top_s, log2_s, top_t, log2_t = row_constants(merged, row, width, STEP)
    value = tl.zeros((LANES,), tl.float32)
    shares = tl.zeros((LANES,), tl.float32)
    unclipped = tl.zeros((LANES,), tl.float32)
    for col in range(begin, end, BLOCK_V):
        c = col + tl.arange(0, BLOCK_V)
        x_s, _ = row_logits(z_s, c, cols, padded, bias_s, cap_s, inv_temp_s)
        x_t, _ = row_logits(z_t, c, cols, padded, bias_t, cap_t, inv_temp_t)
        s, t = probability(x_s, top_s, log2_s), probability(x_t, top_t, log2_t)
        d = log_ratio(x_s, x_t, top_s, log2_s, top_t, log2_t)
        entry, share = entries(s, t, d, beta, rest, KIND)
        if clip is not None:
            unclipped += lane_sum(by_lane(entry, LANES))
            share = tl.where(entry > clip, 0.0, share)
            entry = tl.where(entry > clip, clip, entry)
        value += lane_sum(by_lane(entry, LANES))
        shares += lane_sum(by_lane(share, LANES))
    jump = splits.to(tl.int64) * rows
    at = out + split.to(tl.int64) * rows + row
    tl.store(at, tl.sum(value, 0))
    tl.store(at + jump, tl.sum(shares, 0))
    if clip is not None:
        tl.store(at + 2 * jump, tl.sum(unclipped, 0))
