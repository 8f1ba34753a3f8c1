"""Kernels over rows of logits that a GEMM left in memory: statistics, sums, the largest logits.

A program owns one row and a span of the vocabulary, which it reads BLOCK_V columns at a time. Each
thread keeps statistics of the columns it loads, 4 at a time, and the threads of a program combine
theirs once, at the end: that is what the LANES are. Rows start on 64-element boundaries and are
-inf from the vocabulary's end up to `padded` columns, so loads are whole vectors whatever the size
of the vocabulary. Suffixes _s and _t are student and teacher.

Each span's statistics are stored in the order of `triton_merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LOG_ZERO,
    apply_softcap,
    divergence_terms,
    exp,
    load_class_weights,
    log2,
    log_ratio,
    probability,
)
from opsd_kernels.backends.triton_merge import head_statistics, store_statistics

# Numbers that change from call to call: compiling a kernel again for each would cost seconds.
ROW_JIT_OPTIONS = {
    "do_not_specialize": [
        "cols", "vocab_start", "rows", "merged_stride", "sums_stride", "span", "splits",
    ],
    "do_not_specialize_on_alignment": [
        "label", "scale", "out", "sums", "merged", "totals", "entropy", "center",
    ],
}  # fmt: skip


@triton.jit
def row_logits(raw, o_v, cols, padded, epilogue):
    """(z, slope) of columns o_v of one row: softcap(raw + bias) / temperature, d softcap / d raw.

    `raw` points at the row's first logit.
    """
    b_z = tl.load(raw + o_v, mask=o_v < padded, other=float("-inf"))
    slope = 1.0
    if epilogue.bias is not None:
        b_z += tl.load(epilogue.bias + o_v, mask=o_v < cols, other=0.0).to(tl.float32)
    if epilogue.softcap is not None:
        b_z, slope = apply_softcap(b_z, epilogue.softcap)
        b_z = tl.where(o_v < cols, b_z, float("-inf"))
    return b_z * epilogue.inv_temp, slope


@triton.jit
def load_label_logit(raw, y, begin, end, cols, epilogue):
    """z of column y if it lies in [begin, end) and in the vocabulary, else 0."""
    inside = (y >= begin) & (y < tl.minimum(end, cols))
    o_v = tl.where(inside, y, begin)
    z, _ = row_logits(raw, o_v, cols, cols, epilogue)
    return tl.where(inside, z, 0.0)


@triton.jit
def by_lane(b_x, LANES: tl.constexpr, EACH: tl.constexpr = 4):
    """(BLOCK_V,) as (steps, LANES, EACH): the columns that one thread loads share a lane."""
    return tl.reshape(b_x, (b_x.shape[0] // (EACH * LANES), LANES, EACH))


@triton.jit
def lane_sum(b_x):
    """(LANES,) sums of a (steps, LANES, EACH) tile."""
    return tl.sum(tl.sum(b_x, 2), 0)


@triton.jit
def lane_max(b_x):
    """Maximum of each lane over rows and elements."""
    return tl.max(tl.max(b_x, 2), 0)


@triton.jit
def lane_min(b_x):
    """Minimum of each lane over rows and elements."""
    return tl.min(tl.min(b_x, 2), 0)


@triton.jit
def combine_lanes(lane_row_max, lane_sum_exp, lane_sum_exp_logit):
    """(row_max, sum_exp, sum_exp_logit) of the row from those of its lanes."""
    row_max = tl.max(lane_row_max, 0)
    shift = lane_row_max - row_max
    shrink = exp(shift)
    sum_exp = tl.sum(lane_sum_exp * shrink, 0)
    return row_max, sum_exp, tl.sum((lane_sum_exp_logit + shift * lane_sum_exp) * shrink, 0)


@triton.jit
def _span(rows, span, splits, padded, BLOCK_V: tl.constexpr):
    """(row, index of the span, its first column, its end) of this program."""
    i_n, i_split = tl.program_id(0) % rows, tl.program_id(0) // rows
    begin = i_split * span * BLOCK_V
    return i_n, i_split, begin, tl.minimum(begin + span * BLOCK_V, padded)


# --------------------------------------------------------------------------------------- first pass


@triton.jit(**ROW_JIT_OPTIONS)
def row_statistics(
    raw,  # (rows, padded) fp32 logits, rows `stride` apart
    epilogue,  # Epilogue
    class_weight,  # (cols,) fp32, or None
    label,  # (rows,) int64, or None
    out,  # (statistics, splits, rows) fp32
    rows, cols, padded, stride,
    vocab_start,  # of this rank's shard
    span,  # tiles of BLOCK_V columns per program
    splits,  # programs per row, of all slices in `out`
    BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, PREDICTED: tl.constexpr,
):  # fmt: skip
    """Statistics of one head over this program's span of a row."""
    i_n, i_split, begin, end = _span(rows, span, splits, padded, BLOCK_V)
    raw += i_n.to(tl.int64) * stride
    row_max = tl.full((LANES,), LOG_ZERO, tl.float32)
    sum_exp = tl.zeros((LANES,), tl.float32)
    sum_exp_logit = tl.zeros((LANES,), tl.float32)
    sum_logit = tl.zeros((LANES,), tl.float32)
    sum_weight = tl.zeros((LANES,), tl.float32)
    argmax = tl.full((LANES,), float("inf"), tl.float32)
    for start_v in range(begin, end, BLOCK_V):
        o_v = start_v + tl.arange(0, BLOCK_V)
        b_z, _ = row_logits(raw, o_v, cols, padded, epilogue)
        b_z = by_lane(b_z, LANES)
        new_max = tl.maximum(row_max, lane_max(b_z))
        if PREDICTED:
            is_max = b_z == new_max[None, :, None]
            found = lane_min(tl.where(is_max, by_lane(o_v.to(tl.float32), LANES), float("inf")))
            argmax = tl.where(new_max > row_max, found, argmax)
        shift = row_max - new_max
        shrink = exp(shift)
        b_u = b_z - new_max[None, :, None]
        b_exp = exp(b_u)
        if ENTROPY or SMOOTHED:
            b_u = tl.maximum(b_u, LOG_ZERO)
        if ENTROPY:
            sum_exp_logit = (sum_exp_logit + shift * sum_exp) * shrink + lane_sum(b_exp * b_u)
        if SMOOTHED:
            b_weight = by_lane(load_class_weights(class_weight, o_v, cols), LANES)
            sum_logit += shift * sum_weight + lane_sum(b_u * b_weight)
            sum_weight += lane_sum(b_weight)
        sum_exp = sum_exp * shrink + lane_sum(b_exp)
        row_max = new_max
    whole_max, whole_sum_exp, whole_sum_exp_logit = combine_lanes(row_max, sum_exp, sum_exp_logit)
    stat_stride = splits.to(tl.int64) * rows
    p_out = out + i_split.to(tl.int64) * rows + i_n
    p_out = store_statistics(p_out, stat_stride, (whole_max, whole_sum_exp))
    if ENTROPY:
        p_out = store_statistics(p_out, stat_stride, (whole_sum_exp_logit,))
    if SMOOTHED:
        whole_sum_logit = tl.sum(sum_logit + (row_max - whole_max) * sum_weight, 0)
        p_out = store_statistics(p_out, stat_stride, (whole_sum_logit,))
        p_out = store_statistics(p_out, stat_stride, (tl.sum(sum_weight, 0),))
    if label is not None:
        y = tl.load(label + i_n) - vocab_start
        label_logit = load_label_logit(raw, y, begin, end, cols, epilogue)
        p_out = store_statistics(p_out, stat_stride, (label_logit,))
    if PREDICTED:
        argmax = tl.min(tl.where(row_max == whole_max, argmax, float("inf")), 0)
        tl.store(p_out, argmax + vocab_start)


@triton.jit(**ROW_JIT_OPTIONS)
def row_statistics_pair(
    raw_s, raw_t,  # (rows, padded) fp32 logits, rows `stride` apart
    epilogue_s, epilogue_t,
    label,  # (rows,) int64, or None
    out,  # (statistics, splits, rows) fp32
    rows, cols, padded, stride, vocab_start, span, splits,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Statistics of both heads; for a KL also sum exp(u_p) (u_p - u_q), which gives its value."""
    i_n, i_split, begin, end = _span(rows, span, splits, padded, BLOCK_V)
    raw_s += i_n.to(tl.int64) * stride
    raw_t += i_n.to(tl.int64) * stride
    max_s = tl.full((LANES,), LOG_ZERO, tl.float32)
    max_t = tl.full((LANES,), LOG_ZERO, tl.float32)
    sum_exp_s = tl.zeros((LANES,), tl.float32)
    sum_exp_t = tl.zeros((LANES,), tl.float32)
    sum_exp_logit_s = tl.zeros((LANES,), tl.float32)
    sum_exp_logit_t = tl.zeros((LANES,), tl.float32)
    cross = tl.zeros((LANES,), tl.float32)
    largest_gap = tl.full((LANES,), LOG_ZERO, tl.float32)
    for start_v in range(begin, end, BLOCK_V):
        o_v = start_v + tl.arange(0, BLOCK_V)
        b_z_s, _ = row_logits(raw_s, o_v, cols, padded, epilogue_s)
        b_z_t, _ = row_logits(raw_t, o_v, cols, padded, epilogue_t)
        b_z_s, b_z_t = by_lane(b_z_s, LANES), by_lane(b_z_t, LANES)
        new_s, new_t = tl.maximum(max_s, lane_max(b_z_s)), tl.maximum(max_t, lane_max(b_z_t))
        shift_s, shift_t = max_s - new_s, max_t - new_t
        shrink_s, shrink_t = exp(shift_s), exp(shift_t)
        b_u_s, b_u_t = b_z_s - new_s[None, :, None], b_z_t - new_t[None, :, None]
        b_exp_s, b_exp_t = exp(b_u_s), exp(b_u_t)
        # b_gap is log(p / q) but for the row's constants; infinite if p is possible and q banned.
        if KIND == FORWARD_KL:
            b_gap = b_z_t - b_z_s
            largest_gap = tl.maximum(largest_gap, lane_max(b_gap))
            b_gap = tl.clamp(b_gap, LOG_ZERO, -LOG_ZERO) - (new_t - new_s)[None, :, None]
            cross = (cross + (shift_t - shift_s) * sum_exp_t) * shrink_t + lane_sum(b_exp_t * b_gap)
        elif KIND != JSD:
            b_gap = b_z_s - b_z_t
            largest_gap = tl.maximum(largest_gap, lane_max(b_gap))
            b_gap = tl.clamp(b_gap, LOG_ZERO, -LOG_ZERO) - (new_s - new_t)[None, :, None]
            cross = (cross + (shift_s - shift_t) * sum_exp_s) * shrink_s + lane_sum(b_exp_s * b_gap)
        if ENTROPY:
            b_u_s, b_u_t = tl.maximum(b_u_s, LOG_ZERO), tl.maximum(b_u_t, LOG_ZERO)
            sum_exp_logit_s = (sum_exp_logit_s + shift_s * sum_exp_s) * shrink_s
            sum_exp_logit_s += lane_sum(b_exp_s * b_u_s)
            sum_exp_logit_t = (sum_exp_logit_t + shift_t * sum_exp_t) * shrink_t
            sum_exp_logit_t += lane_sum(b_exp_t * b_u_t)
        sum_exp_s = sum_exp_s * shrink_s + lane_sum(b_exp_s)
        sum_exp_t = sum_exp_t * shrink_t + lane_sum(b_exp_t)
        max_s, max_t = new_s, new_t
    row_s = combine_lanes(max_s, sum_exp_s, sum_exp_logit_s)
    row_t = combine_lanes(max_t, sum_exp_t, sum_exp_logit_t)
    y = begin
    if label is not None:
        y = (tl.load(label + i_n) - vocab_start).to(tl.int32)
    stat_stride = splits.to(tl.int64) * rows
    p_out = out + i_split.to(tl.int64) * rows + i_n
    label_logit = load_label_logit(raw_s, y, begin, end, cols, epilogue_s)
    p_out = store_head(p_out, stat_stride, row_s, label_logit, label, ENTROPY)
    label_logit = load_label_logit(raw_t, y, begin, end, cols, epilogue_t)
    p_out = store_head(p_out, stat_stride, row_t, label_logit, label, ENTROPY)
    if KIND != JSD:
        gap = (max_s - row_s[0]) - (max_t - row_t[0])
        if KIND == FORWARD_KL:
            cross = (cross - gap * sum_exp_t) * exp(max_t - row_t[0])
        else:
            cross = (cross + gap * sum_exp_s) * exp(max_s - row_s[0])
        tl.store(p_out, tl.sum(cross, 0))
        infinite = tl.where(tl.max(largest_gap, 0) > -0.5 * LOG_ZERO, 1.0, 0.0)
        tl.store(p_out + stat_stride, infinite)


@triton.jit
def store_head(p_out, stat_stride, head, label_logit, label, ENTROPY: tl.constexpr):
    """Store (row_max, sum_exp, sum_exp_logit) and the label's logit, those that are asked for.

    Returns the place of the next statistic.
    """
    stats = head_statistics(
        head[0], head[1], head[2] if ENTROPY else None, None, None,
        label_logit if label is not None else None, None,
    )  # fmt: skip
    return store_statistics(p_out, stat_stride, stats)


# -------------------------------------------------------------------------------------- second pass


@triton.jit
def load_row_constants(merged, i_n, merged_stride, HEAD_STATISTICS: tl.constexpr):
    """(row_max_s, log2_sum_s, row_max_t, log2_sum_t) of a row.

    merged (statistics, merged_stride) has HEAD_STATISTICS rows of each head, the student's first.
    """
    p_s = merged + i_n
    p_t = p_s + HEAD_STATISTICS * merged_stride.to(tl.int64)
    row_max_s, row_max_t = tl.load(p_s), tl.load(p_t)
    log2_sum_s = log2(tl.load(p_s + merged_stride))
    return row_max_s, log2_sum_s, row_max_t, log2(tl.load(p_t + merged_stride))


@triton.jit(**ROW_JIT_OPTIONS)
def row_divergence_sums(
    raw_s, raw_t,  # (rows, padded) fp32 logits, rows `stride` apart
    epilogue_s, epilogue_t,
    merged,  # (statistics, merged_stride) fp32 of whole rows
    out,  # (2 or 3, splits, rows) fp32
    rows, cols, padded, stride, merged_stride,
    beta, one_minus_beta,
    clip,  # largest entry, or None
    span, splits,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, HEAD_STATISTICS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Value, sum of shares and, with a clip, value without it, over a span of a row."""
    i_n, i_split, begin, end = _span(rows, span, splits, padded, BLOCK_V)
    raw_s += i_n.to(tl.int64) * stride
    raw_t += i_n.to(tl.int64) * stride
    row_max_s, log2_sum_s, row_max_t, log2_sum_t = load_row_constants(
        merged, i_n, merged_stride, HEAD_STATISTICS
    )
    value = tl.zeros((LANES,), tl.float32)
    sum_share = tl.zeros((LANES,), tl.float32)
    unclipped = tl.zeros((LANES,), tl.float32)
    for start_v in range(begin, end, BLOCK_V):
        o_v = start_v + tl.arange(0, BLOCK_V)
        b_z_s, _ = row_logits(raw_s, o_v, cols, padded, epilogue_s)
        b_z_t, _ = row_logits(raw_t, o_v, cols, padded, epilogue_t)
        b_s = probability(b_z_s, row_max_s, log2_sum_s)
        b_t = probability(b_z_t, row_max_t, log2_sum_t)
        b_d = log_ratio(b_z_t - b_z_s, row_max_s, log2_sum_s, row_max_t, log2_sum_t)
        b_entry, b_share = divergence_terms(b_s, b_t, b_d, beta, one_minus_beta, KIND)
        if clip is not None:
            unclipped += lane_sum(by_lane(b_entry, LANES))
            b_share = tl.where(b_entry > clip, 0.0, b_share)
            b_entry = tl.where(b_entry > clip, clip, b_entry)
        value += lane_sum(by_lane(b_entry, LANES))
        sum_share += lane_sum(by_lane(b_share, LANES))
    sum_stride = splits.to(tl.int64) * rows
    p_out = out + i_split.to(tl.int64) * rows + i_n
    tl.store(p_out, tl.sum(value, 0))
    tl.store(p_out + sum_stride, tl.sum(sum_share, 0))
    if clip is not None:
        tl.store(p_out + 2 * sum_stride, tl.sum(unclipped, 0))


@triton.jit(do_not_specialize=["cols", "k"])
def row_largest(z, least, equals, out, cols, stride, k, BLOCK_V: tl.constexpr):
    """The k columns whose logits are above `least` or among the first `equals` equal to it.

    They ascend. NaN is above everything, as in torch.topk.
    """
    row = tl.program_id(0).to(tl.int64)
    least_logit, wanted = tl.load(least + row), tl.load(equals + row)
    found, equal_found = 0, 0
    for start in range(0, cols, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        inside = o_v < cols
        b_z = tl.load(z + row * stride + o_v, inside, 0.0)
        equal = inside & (b_z == least_logit)
        rank = equal_found + tl.cumsum(equal.to(tl.int32), 0)
        above = inside & ((b_z > least_logit) | (b_z != b_z))
        take = above | (equal & (rank <= wanted))
        place = found + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(out + row * k + place, o_v.to(tl.int64), take & (place < k))
        found += tl.sum(take.to(tl.int32), 0)
        equal_found += tl.sum(equal.to(tl.int32), 0)
