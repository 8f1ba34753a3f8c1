"""Fused kernels of the CUDA backend: statistics of rows and sums of a divergence, without logits.

A program multiplies its tiles of logits from hidden states `x` and head `w`. It owns R rows and a
span of the vocabulary, whose statistics it writes for `merge`.

Statistics are (rows of float32) in the order of `passes.Layout`: per head maximum, sum of
exponentials, sum of p u for the entropy, sum of w u and of w for label smoothing, the label's
logit, the first column of the maximum; then, of a pair, the cross sum and an infinite KL's mark.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LOG_ZERO,
    class_weights,
    entries,
    exp,
    log2,
    log_ratio,
    probability,
    rescaled,
)
from opsd_kernels.backends.triton_tiles import (
    crossed,
    finished,
    part_of,
    product,
    risen,
    shared_products,
)

# Sizes that change from call to call, and rows of longer tensors, which start anywhere; a kernel
# compiled again for each would cost seconds.
HOW = {
    "do_not_specialize": [
        "rows", "width", "out_width", "part_width", "span", "splits", "count", "first", "offset",
    ],
    "do_not_specialize_on_alignment": [
        "label", "out", "merged", "totals", "entropy", "scale", "entropy_scale",
    ],
}  # fmt: skip


@triton.jit
def place(row_blocks, columns, GROUP: tl.constexpr):
    """(row block, column index) of this program: a band of row blocks shares its columns in L2."""
    pid = tl.program_id(0)
    band = pid // (GROUP * columns)
    first = band * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    inside = pid % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def tiles_of(
    x_s, w_s, depth_s, s_row, s_k, ws_row, ws_k, x_t, w_t, depth_t, t_row, t_k, wt_row, wt_k,
    row, col, rows, cols,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, C) raw logits of student and teacher."""
    if SHARED:
        raw_s, raw_t = shared_products(
            x_s, x_t, w_s, row, col, rows, cols, depth_s, s_row, s_k, t_row, t_k, ws_row, ws_k,
            R, C, K, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
    else:
        raw_s = product(
            x_s, w_s, row, col, rows, cols, depth_s, s_row, s_k, ws_row, ws_k,
            R, C, K, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
        raw_t = product(
            x_t, w_t, row, col, rows, cols, depth_t, t_row, t_k, wt_row, wt_k,
            R, C, K, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
    return raw_s, raw_t


@triton.jit
def labels_of(label, r, rows, cols, first):
    """Column of each row's label in this shard, -1 where another owns it."""
    y = tl.load(label + tl.minimum(r, rows - 1)) - first
    return tl.where(y < cols, y, -1).to(tl.int32)


@triton.jit
def _picked(z, y, col, C: tl.constexpr):
    """The label's logit if it lies in this tile, else 0."""
    c = col + tl.arange(0, C)
    return tl.sum(tl.where(c[None, :] == y[:, None], z, 0.0), 1)


@triton.jit
def _column_of(z, top, col, C: tl.constexpr):
    """The first column of each row's tile that holds `top`."""
    c = (col + tl.arange(0, C)).to(tl.float32)
    return tl.min(tl.where(z == top[:, None], c[None, :], float("inf")), 1)


# --------------------------------------------------------------------------------------- first pass


@triton.jit(**HOW)
def statistics(
    x, w, bias, softcap, inv_temp, depth, x_row, x_k, w_row, w_k,
    class_weight, label, out, rows, cols, first, width, span, splits,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, PREDICTED: tl.constexpr,
):  # fmt: skip
    """Statistics of one head over this program's span of the vocabulary."""
    block, split = place(tl.cdiv(rows, R), splits, GROUP)
    row = block * R
    r = row + tl.arange(0, R)
    top = tl.full((R,), LOG_ZERO, tl.float32)
    total = tl.zeros((R,), tl.float32)
    weighted = tl.zeros((R,), tl.float32)
    plain = tl.zeros((R,), tl.float32)
    number = tl.zeros((R,), tl.float32)
    picked = tl.zeros((R,), tl.float32)
    best = tl.full((R,), float("inf"), tl.float32)
    PART: tl.constexpr = C // PARTS
    begin = split * span * C
    end = tl.minimum(begin + span * C, cols)
    if label is not None:
        y = labels_of(label, r, rows, cols, first)
    for col in range(begin, end, C):
        raw = product(
            x, w, row, col, rows, cols, depth, x_row, x_k, w_row, w_k,
            R, C, K, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            c = col + part * PART
            piece = part_of(raw, part, PARTS, R, C)
            z, _ = finished(piece, c, cols, bias, softcap, inv_temp, PART)
            now, shift = risen(z, top)
            if PREDICTED:
                best = tl.where(now > top, _column_of(z, now, c, PART), best)
            top = now
            u = z - top[:, None]
            p = exp(u)
            if ENTROPY:
                weighted = rescaled(weighted, shift, total) + tl.sum(p * u, 1)
            if SMOOTHED:
                each = class_weights(class_weight, c + tl.arange(0, PART), cols)
                plain += shift * number + tl.sum(each[None, :] * u, 1)
                number += tl.sum(each, 0)
            total = total * exp(shift) + tl.sum(p, 1)
            if label is not None:
                picked += _picked(z, y, c, PART)
    inside = r < rows
    stride = splits.to(tl.int64) * width
    at = out + split.to(tl.int64) * width + r
    tl.store(at, top, inside)
    tl.store(at + stride, total, inside)
    at += 2 * stride
    if ENTROPY:
        tl.store(at, weighted, inside)
        at += stride
    if SMOOTHED:
        tl.store(at, plain, inside)
        tl.store(at + stride, number, inside)
        at += 2 * stride
    if label is not None:
        tl.store(at, picked, inside)
        at += stride
    if PREDICTED:
        tl.store(at, best + first, inside)


@triton.jit(**HOW)
def statistics_pair(
    x_s, w_s, bias_s, cap_s, inv_temp_s, depth_s, s_row, s_k, ws_row, ws_k,
    x_t, w_t, bias_t, cap_t, inv_temp_t, depth_t, t_row, t_k, wt_row, wt_k,
    label, out, rows, cols, first, width, span, splits,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SHARED: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Statistics of both heads; for a KL also sum p (u_p - u_q), which makes its value."""
    block, split = place(tl.cdiv(rows, R), splits, GROUP)
    row = block * R
    r = row + tl.arange(0, R)
    top_s = tl.full((R,), LOG_ZERO, tl.float32)
    top_t = tl.full((R,), LOG_ZERO, tl.float32)
    total_s = tl.zeros((R,), tl.float32)
    total_t = tl.zeros((R,), tl.float32)
    weighted_s = tl.zeros((R,), tl.float32)
    weighted_t = tl.zeros((R,), tl.float32)
    picked_s = tl.zeros((R,), tl.float32)
    picked_t = tl.zeros((R,), tl.float32)
    cross = tl.zeros((R,), tl.float32)
    infinite = tl.zeros((R,), tl.float32)
    PART: tl.constexpr = C // PARTS
    begin = split * span * C
    end = tl.minimum(begin + span * C, cols)
    if label is not None:
        y = labels_of(label, r, rows, cols, first)
    for col in range(begin, end, C):
        raw_s, raw_t = tiles_of(
            x_s, w_s, depth_s, s_row, s_k, ws_row, ws_k,
            x_t, w_t, depth_t, t_row, t_k, wt_row, wt_k, row, col, rows, cols,
            R, C, K, SHARED, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            c = col + part * PART
            part_s = part_of(raw_s, part, PARTS, R, C)
            part_t = part_of(raw_t, part, PARTS, R, C)
            z_s, _ = finished(part_s, c, cols, bias_s, cap_s, inv_temp_s, PART)
            z_t, _ = finished(part_t, c, cols, bias_t, cap_t, inv_temp_t, PART)
            if label is not None:
                picked_s += _picked(z_s, y, c, PART)
                picked_t += _picked(z_t, y, c, PART)
            top_s, shift_s = risen(z_s, top_s)
            top_t, shift_t = risen(z_t, top_t)
            if KIND == FORWARD_KL:
                infinite = tl.maximum(infinite, crossed(z_t, z_s))
                cross = rescaled(cross, shift_t, total_t, shift_s)
            elif KIND != JSD:
                infinite = tl.maximum(infinite, crossed(z_s, z_t))
                cross = rescaled(cross, shift_s, total_s, shift_t)
            u_s = z_s - top_s[:, None]
            u_t = z_t - top_t[:, None]
            s = exp(u_s)
            t = exp(u_t)
            if KIND == FORWARD_KL:
                cross += tl.sum(t * (u_t - u_s), 1)
            elif KIND != JSD:
                cross += tl.sum(s * (u_s - u_t), 1)
            if ENTROPY:
                weighted_s = rescaled(weighted_s, shift_s, total_s) + tl.sum(s * u_s, 1)
                weighted_t = rescaled(weighted_t, shift_t, total_t) + tl.sum(t * u_t, 1)
            total_s = total_s * exp(shift_s) + tl.sum(s, 1)
            total_t = total_t * exp(shift_t) + tl.sum(t, 1)
    inside = r < rows
    stride = splits.to(tl.int64) * width
    at = out + split.to(tl.int64) * width + r
    at = _store_head(at, stride, top_s, total_s, weighted_s, picked_s, inside, label, ENTROPY)
    at = _store_head(at, stride, top_t, total_t, weighted_t, picked_t, inside, label, ENTROPY)
    if KIND != JSD:
        tl.store(at, cross, inside)
        tl.store(at + stride, infinite, inside)


@triton.jit
def _store_head(at, stride, top, total, weighted, picked, inside, label, ENTROPY: tl.constexpr):
    tl.store(at, top, inside)
    tl.store(at + stride, total, inside)
    at += 2 * stride
    if ENTROPY:
        tl.store(at, weighted, inside)
        at += stride
    if label is not None:
        tl.store(at, picked, inside)
        at += stride
    return at


# -------------------------------------------------------------------------------------- second pass


@triton.jit
def constants(merged, r, rows, width, STEP: tl.constexpr):
    """(R, 1) maximum and log2 of the sum of each head; the teacher's stand STEP rows later."""
    at = (merged + tl.minimum(r, rows - 1))[:, None]
    other = at + STEP * width.to(tl.int64)
    top_s, top_t = tl.load(at), tl.load(other)
    return top_s, log2(tl.load(at + width)), top_t, log2(tl.load(other + width))


@triton.jit(**HOW)
def divergence_sums(
    x_s, w_s, bias_s, cap_s, inv_temp_s, depth_s, s_row, s_k, ws_row, ws_k,
    x_t, w_t, bias_t, cap_t, inv_temp_t, depth_t, t_row, t_k, wt_row, wt_k,
    merged, out, rows, cols, width, out_width, beta, rest, clip, span, splits,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SHARED: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Value, sum of shares and, with a clip, value without it, over a span of the vocabulary."""
    block, split = place(tl.cdiv(rows, R), splits, GROUP)
    row = block * R
    r = row + tl.arange(0, R)
    top_s, log2_s, top_t, log2_t = constants(merged, r, rows, width, STEP)
    value = tl.zeros((R,), tl.float32)
    shares = tl.zeros((R,), tl.float32)
    unclipped = tl.zeros((R,), tl.float32)
    PART: tl.constexpr = C // PARTS
    begin = split * span * C
    for col in range(begin, tl.minimum(begin + span * C, cols), C):
        raw_s, raw_t = tiles_of(
            x_s, w_s, depth_s, s_row, s_k, ws_row, ws_k,
            x_t, w_t, depth_t, t_row, t_k, wt_row, wt_k, row, col, rows, cols,
            R, C, K, SHARED, DESCRIBED, EVEN, PRECISION,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            c = col + part * PART
            part_s = part_of(raw_s, part, PARTS, R, C)
            part_t = part_of(raw_t, part, PARTS, R, C)
            z_s, _ = finished(part_s, c, cols, bias_s, cap_s, inv_temp_s, PART)
            z_t, _ = finished(part_t, c, cols, bias_t, cap_t, inv_temp_t, PART)
            s, t = probability(z_s, top_s, log2_s), probability(z_t, top_t, log2_t)
            d = log_ratio(z_s, z_t, top_s, log2_s, top_t, log2_t)
            entry, share = entries(s, t, d, beta, rest, KIND)
            if clip is not None:
                unclipped += tl.sum(entry, 1)
                share = tl.where(entry > clip, 0.0, share)
                entry = tl.where(entry > clip, clip, entry)
            value += tl.sum(entry, 1)
            shares += tl.sum(share, 1)
    inside = r < rows
    stride = splits.to(tl.int64) * out_width
    at = out + split.to(tl.int64) * out_width + r
    tl.store(at, value, inside)
    tl.store(at + stride, shares, inside)
    if clip is not None:
        tl.store(at + 2 * stride, unclipped, inside)
