"""Row statistics: the order in which kernels store them, and the merge of partial ones.

Every kernel that walks a span of the vocabulary stores one fp32 number per row and statistic. In
the order of `passes.Layout`, for each head:

    row_max        largest logit z
    sum_exp        sum exp(u), with u = z - row_max
    sum_exp_logit  sum exp(u) u, for the entropy
    sum_logit      sum w u, for label smoothing with class weights w
    sum_weight     sum w
    label_logit    z of the label, 0 if it is outside the span
    argmax         first column of the maximum

then, for a KL of a pair of heads, `cross` = sum exp(u_p) (u_p - u_q), and `infinite`, 1 if a column
is possible under p and banned under q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import FORWARD_KL, JSD, LOG_ZERO, exp, rescale_sum


@triton.jit
def head_statistics(
    row_max, sum_exp, sum_exp_logit, sum_logit, sum_weight, label_logit, argmax
):  # fmt: skip
    """The statistics of one head as a tuple in their order, without those that are None."""
    stats = (row_max, sum_exp)
    if sum_exp_logit is not None:
        stats += (sum_exp_logit,)
    if sum_logit is not None:
        stats += (sum_logit, sum_weight)
    if label_logit is not None:
        stats += (label_logit,)
    if argmax is not None:
        stats += (argmax,)
    return stats


@triton.jit
def store_statistics(p_out, stride, stats, mask=None):
    """Store a tuple's statistics `stride` elements apart; returns the place of the next one."""
    for i in tl.static_range(len(stats)):
        tl.store(p_out, stats[i], mask)
        p_out += stride
    return p_out


@triton.jit
def _span_offsets(first, count, span_stride, BLOCK_SPANS: tl.constexpr):
    """(BLOCK_SPANS, 1) offsets of the spans from `first` on, and the mask of those that exist."""
    i_span = first + tl.arange(0, BLOCK_SPANS)[:, None]
    return i_span.to(tl.int64) * span_stride, i_span < count


@triton.jit
def _merge_head(
    p_stats, count, span_stride, stat_stride,
    BLOCK_N: tl.constexpr, BLOCK_SPANS: tl.constexpr,
    ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, LABEL: tl.constexpr, PREDICTED: tl.constexpr,
):  # fmt: skip
    """Statistics of one head over all spans, from those of each, which begin at `p_stats`."""
    row_max = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    for first in range(0, count, BLOCK_SPANS):
        o_span, mask = _span_offsets(first, count, span_stride, BLOCK_SPANS)
        row_max = tl.maximum(row_max, tl.max(tl.load(p_stats + o_span, mask, LOG_ZERO), 0))
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    sum_exp_logit = tl.zeros((BLOCK_N,), tl.float32)
    sum_logit = tl.zeros((BLOCK_N,), tl.float32)
    sum_weight = tl.zeros((BLOCK_N,), tl.float32)
    label_logit = tl.zeros((BLOCK_N,), tl.float32)
    argmax = tl.full((BLOCK_N,), float("inf"), tl.float32)
    for first in range(0, count, BLOCK_SPANS):
        o_span, mask = _span_offsets(first, count, span_stride, BLOCK_SPANS)
        p_span = p_stats + o_span
        b_shift = tl.load(p_span, mask, LOG_ZERO) - row_max[None, :]
        p_span += stat_stride
        b_sum_exp = tl.load(p_span, mask, 0.0)
        sum_exp += tl.sum(b_sum_exp * exp(b_shift), 0)
        p_span += stat_stride
        if ENTROPY:
            b_sum_exp_logit = tl.load(p_span, mask, 0.0)
            sum_exp_logit += tl.sum(rescale_sum(b_sum_exp_logit, b_shift, b_sum_exp), 0)
            p_span += stat_stride
        if SMOOTHED:
            b_sum_weight = tl.load(p_span + stat_stride, mask, 0.0)
            b_moved = tl.load(p_span, mask, 0.0) + tl.where(mask, b_shift, 0.0) * b_sum_weight
            sum_logit += tl.sum(b_moved, 0)
            sum_weight += tl.sum(b_sum_weight, 0)
            p_span += 2 * stat_stride
        if LABEL:
            label_logit += tl.sum(tl.load(p_span, mask, 0.0), 0)
            p_span += stat_stride
        if PREDICTED:
            b_argmax = tl.load(p_span, mask, float("inf"))
            b_argmax = tl.where(b_shift == 0, b_argmax, float("inf"))
            argmax = tl.minimum(argmax, tl.min(b_argmax, 0))
    return head_statistics(
        row_max, sum_exp, sum_exp_logit if ENTROPY else None,
        sum_logit if SMOOTHED else None, sum_weight if SMOOTHED else None,
        label_logit if LABEL else None, argmax if PREDICTED else None,
    )  # fmt: skip


@triton.jit
def _merge_cross(
    p_p, p_q, p_cross, max_p, max_q, count, span_stride, stat_stride,
    BLOCK_N: tl.constexpr, BLOCK_SPANS: tl.constexpr,
):  # fmt: skip
    """(cross, infinite) of KL(p || q) over all spans; p_p and p_q point at the heads' row_max."""
    cross = tl.zeros((BLOCK_N,), tl.float32)
    infinite = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, count, BLOCK_SPANS):
        o_span, mask = _span_offsets(first, count, span_stride, BLOCK_SPANS)
        b_shift_p = tl.load(p_p + o_span, mask, LOG_ZERO) - max_p[None, :]
        b_shift_q = tl.load(p_q + o_span, mask, LOG_ZERO) - max_q[None, :]
        b_cross = tl.load(p_cross + o_span, mask, 0.0)
        b_sum_exp = tl.load(p_p + o_span + stat_stride, mask, 0.0)
        b_moved = rescale_sum(b_cross, b_shift_p, b_sum_exp, b_shift_q)
        cross += tl.sum(tl.where(mask, b_moved, 0.0), 0)
        b_infinite = tl.load(p_cross + o_span + stat_stride, mask, 0.0)
        infinite = tl.maximum(infinite, tl.max(b_infinite, 0))
    return cross, infinite


@triton.jit(
    do_not_specialize=["rows", "out_stride", "count", "parts_stride"],
    do_not_specialize_on_alignment=["out"],
)
def merge(
    parts,  # (statistics, count, parts_stride) fp32
    out,  # (statistics, out_stride) fp32
    rows,
    out_stride,
    count,  # spans or ranks
    parts_stride,
    BLOCK_N: tl.constexpr, BLOCK_SPANS: tl.constexpr, HEADS: tl.constexpr,
    ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, LABEL: tl.constexpr, PREDICTED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Statistics of whole rows from those of `count` spans, or of as many ranks."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_s = parts + tl.minimum(o_n, rows - 1)[None, :]
    span_stride = parts_stride.to(tl.int64)
    stat_stride = span_stride * count
    stats_s = _merge_head(
        p_s, count, span_stride, stat_stride, BLOCK_N, BLOCK_SPANS, ENTROPY, SMOOTHED, LABEL,
        PREDICTED,
    )  # fmt: skip
    p_out = store_statistics(out + o_n, out_stride, stats_s, o_n < rows)
    if HEADS == 2:
        p_t = p_s + len(stats_s) * stat_stride
        stats_t = _merge_head(
            p_t, count, span_stride, stat_stride, BLOCK_N, BLOCK_SPANS, ENTROPY, SMOOTHED, LABEL,
            PREDICTED,
        )  # fmt: skip
        p_out = store_statistics(p_out, out_stride, stats_t, o_n < rows)
        if KIND != JSD:
            p_cross = p_t + len(stats_s) * stat_stride
            if KIND == FORWARD_KL:
                cross = _merge_cross(
                    p_t, p_s, p_cross, stats_t[0], stats_s[0], count, span_stride, stat_stride,
                    BLOCK_N, BLOCK_SPANS,
                )  # fmt: skip
            else:
                cross = _merge_cross(
                    p_s, p_t, p_cross, stats_s[0], stats_t[0], count, span_stride, stat_stride,
                    BLOCK_N, BLOCK_SPANS,
                )  # fmt: skip
            store_statistics(p_out, out_stride, cross, o_n < rows)
