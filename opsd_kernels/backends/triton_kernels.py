"""Fused kernels of the schedule `streaming`: row statistics and divergence sums, without logits.

Each program multiplies its own tiles of logits from hidden states x and head weight w. It owns
BLOCK_N rows and a span of the vocabulary, and writes one partial result for each row, which
`triton_merge` merges. Suffixes _s and _t are student and teacher.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LOG_ZERO,
    divergence_terms,
    exp,
    load_class_weights,
    log2,
    log_ratio,
    probability,
    rescale_sum,
    sum_columns,
)
from opsd_kernels.backends.triton_merge import head_statistics, store_statistics
from opsd_kernels.backends.triton_tiles import (
    apply_bias_cap_temperature,
    column_part,
    has_infinite_kl,
    matmul_tile,
    matmul_tile_pair,
    update_max,
)

# Sizes that change from call to call, and rows of longer tensors, which start anywhere: compiling a
# kernel again for each would cost seconds.
JIT_OPTIONS = {
    "do_not_specialize": ["rows", "merged_stride", "out_stride", "span", "splits", "vocab_start"],
    "do_not_specialize_on_alignment": [
        "label", "out", "merged", "totals", "entropy", "scale", "entropy_scale",
    ],
}  # fmt: skip


@triton.jit
def swizzle_pid(row_blocks, column_blocks, GROUP: tl.constexpr):
    """(row block, column block) of this program.

    Programs go down GROUP row blocks before the next column block, so the group's row blocks find
    the columns' weights in L2.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * column_blocks)
    first = group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    pid_in_group = pid % (GROUP * column_blocks)
    return first + pid_in_group % height, pid_in_group // height


@triton.jit
def load_label(label, o_n, rows, cols, vocab_start):
    """Column of each row's label in this rank's shard, -1 if another rank owns it."""
    y = tl.load(label + tl.minimum(o_n, rows - 1)) - vocab_start
    return tl.where(y < cols, y, -1).to(tl.int32)


@triton.jit
def _label_logit(b_z, y, start_v, BLOCK_V: tl.constexpr):
    """The label's logit if it lies in this tile, else 0."""
    o_v = start_v + tl.arange(0, BLOCK_V)
    return tl.sum(tl.where(o_v[None, :] == y[:, None], b_z, 0.0), 1)


@triton.jit
def _first_column_of(b_z, row_max, start_v, BLOCK_V: tl.constexpr):
    """The first column of each row's tile that equals row_max, as a float."""
    o_v = (start_v + tl.arange(0, BLOCK_V)).to(tl.float32)
    return tl.min(tl.where(b_z == row_max[:, None], o_v[None, :], float("inf")), 1)


# --------------------------------------------------------------------------------------- first pass


@triton.jit(**JIT_OPTIONS)
def statistics(
    x,  # (rows, D), or its tensor descriptor with USE_TMA
    w,  # (cols, D), likewise
    epilogue,  # Epilogue
    sizes,  # MatmulSizes
    class_weight,  # (cols,) fp32, or None
    label,  # (rows,) int64, or None
    out,  # (statistics, splits, out_stride) fp32
    rows, cols,
    vocab_start,  # of this rank's shard
    out_stride,
    span,  # tiles of BLOCK_V columns per program
    splits,  # programs per row block
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, PREDICTED: tl.constexpr,
):  # fmt: skip
    """Statistics of one head over this program's span of the vocabulary."""
    i_n, i_split = swizzle_pid(tl.cdiv(rows, BLOCK_N), splits, GROUP)
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    row_max = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    sum_exp_logit = tl.zeros((BLOCK_N,), tl.float32)
    sum_logit = tl.zeros((BLOCK_N,), tl.float32)
    sum_weight = tl.zeros((BLOCK_N,), tl.float32)
    label_logit = tl.zeros((BLOCK_N,), tl.float32)
    argmax = tl.full((BLOCK_N,), float("inf"), tl.float32)
    PART_V: tl.constexpr = BLOCK_V // PARTS
    begin = i_split * span * BLOCK_V
    end = tl.minimum(begin + span * BLOCK_V, cols)
    if label is not None:
        y = load_label(label, o_n, rows, cols, vocab_start)
    for start_v in range(begin, end, BLOCK_V):
        b_raw = matmul_tile(
            x, w, sizes, start_n, start_v, rows, cols,
            BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
        for i_part in tl.static_range(PARTS):
            part_v = start_v + i_part * PART_V
            b_part = column_part(b_raw, i_part, PARTS, BLOCK_N, BLOCK_V)
            b_z, _ = apply_bias_cap_temperature(b_part, part_v, cols, epilogue, PART_V)
            new_max, shift = update_max(b_z, row_max)
            if PREDICTED:
                found = _first_column_of(b_z, new_max, part_v, PART_V)
                argmax = tl.where(new_max > row_max, found, argmax)
            row_max = new_max
            b_u = b_z - row_max[:, None]
            b_exp = exp(b_u)
            if ENTROPY:
                sum_exp_logit = rescale_sum(sum_exp_logit, shift, sum_exp)
                sum_exp_logit += sum_columns(b_exp * b_u)
            if SMOOTHED:
                b_weight = load_class_weights(class_weight, part_v + tl.arange(0, PART_V), cols)
                sum_logit += shift * sum_weight + sum_columns(b_weight[None, :] * b_u)
                sum_weight += tl.sum(b_weight, 0)
            sum_exp = sum_exp * exp(shift) + tl.sum(b_exp, 1)
            if label is not None:
                label_logit += _label_logit(b_z, y, part_v, PART_V)
    stats = head_statistics(
        row_max, sum_exp, sum_exp_logit if ENTROPY else None,
        sum_logit if SMOOTHED else None, sum_weight if SMOOTHED else None,
        label_logit if label is not None else None,
        argmax + vocab_start if PREDICTED else None,
    )  # fmt: skip
    mask_n, stat_stride = o_n < rows, splits.to(tl.int64) * out_stride
    store_statistics(out + i_split.to(tl.int64) * out_stride + o_n, stat_stride, stats, mask_n)


@triton.jit(**JIT_OPTIONS)
def statistics_pair(
    x_s, w_s, epilogue_s, sizes_s,  # (rows, D), (cols, D), Epilogue, MatmulSizes as above
    x_t, w_t, epilogue_t, sizes_t,
    label,  # (rows,) int64, or None
    out,  # (statistics, splits, out_stride) fp32
    rows, cols, vocab_start, out_stride, span, splits,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Statistics of both heads; for a KL also sum exp(u_p) (u_p - u_q), which gives its value."""
    i_n, i_split = swizzle_pid(tl.cdiv(rows, BLOCK_N), splits, GROUP)
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    row_max_s = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    row_max_t = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    sum_exp_s = tl.zeros((BLOCK_N,), tl.float32)
    sum_exp_t = tl.zeros((BLOCK_N,), tl.float32)
    sum_exp_logit_s = tl.zeros((BLOCK_N,), tl.float32)
    sum_exp_logit_t = tl.zeros((BLOCK_N,), tl.float32)
    label_logit_s = tl.zeros((BLOCK_N,), tl.float32)
    label_logit_t = tl.zeros((BLOCK_N,), tl.float32)
    cross = tl.zeros((BLOCK_N,), tl.float32)
    infinite = tl.zeros((BLOCK_N,), tl.float32)
    PART_V: tl.constexpr = BLOCK_V // PARTS
    begin = i_split * span * BLOCK_V
    end = tl.minimum(begin + span * BLOCK_V, cols)
    if label is not None:
        y = load_label(label, o_n, rows, cols, vocab_start)
    for start_v in range(begin, end, BLOCK_V):
        b_raw_s, b_raw_t = matmul_tile_pair(
            x_s, w_s, sizes_s, x_t, w_t, sizes_t, start_n, start_v, rows, cols,
            BLOCK_N, BLOCK_V, BLOCK_D, SHARED, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
        for i_part in tl.static_range(PARTS):
            part_v = start_v + i_part * PART_V
            b_part_s = column_part(b_raw_s, i_part, PARTS, BLOCK_N, BLOCK_V)
            b_part_t = column_part(b_raw_t, i_part, PARTS, BLOCK_N, BLOCK_V)
            b_z_s, _ = apply_bias_cap_temperature(b_part_s, part_v, cols, epilogue_s, PART_V)
            b_z_t, _ = apply_bias_cap_temperature(b_part_t, part_v, cols, epilogue_t, PART_V)
            if label is not None:
                label_logit_s += _label_logit(b_z_s, y, part_v, PART_V)
                label_logit_t += _label_logit(b_z_t, y, part_v, PART_V)
            row_max_s, shift_s = update_max(b_z_s, row_max_s)
            row_max_t, shift_t = update_max(b_z_t, row_max_t)
            if KIND == FORWARD_KL:
                infinite = tl.maximum(infinite, has_infinite_kl(b_z_t, b_z_s))
                cross = rescale_sum(cross, shift_t, sum_exp_t, shift_s)
            elif KIND != JSD:
                infinite = tl.maximum(infinite, has_infinite_kl(b_z_s, b_z_t))
                cross = rescale_sum(cross, shift_s, sum_exp_s, shift_t)
            b_u_s = b_z_s - row_max_s[:, None]
            b_u_t = b_z_t - row_max_t[:, None]
            b_exp_s = exp(b_u_s)
            b_exp_t = exp(b_u_t)
            if KIND == FORWARD_KL:
                cross += sum_columns(b_exp_t * (b_u_t - b_u_s))
            elif KIND != JSD:
                cross += sum_columns(b_exp_s * (b_u_s - b_u_t))
            if ENTROPY:
                sum_exp_logit_s = rescale_sum(sum_exp_logit_s, shift_s, sum_exp_s)
                sum_exp_logit_s += sum_columns(b_exp_s * b_u_s)
                sum_exp_logit_t = rescale_sum(sum_exp_logit_t, shift_t, sum_exp_t)
                sum_exp_logit_t += sum_columns(b_exp_t * b_u_t)
            sum_exp_s = sum_exp_s * exp(shift_s) + tl.sum(b_exp_s, 1)
            sum_exp_t = sum_exp_t * exp(shift_t) + tl.sum(b_exp_t, 1)
    stats = head_statistics(
        row_max_s, sum_exp_s, sum_exp_logit_s if ENTROPY else None, None, None,
        label_logit_s if label is not None else None, None,
    )  # fmt: skip
    stats += head_statistics(
        row_max_t, sum_exp_t, sum_exp_logit_t if ENTROPY else None, None, None,
        label_logit_t if label is not None else None, None,
    )  # fmt: skip
    if KIND != JSD:
        stats += (cross, infinite)
    mask_n, stat_stride = o_n < rows, splits.to(tl.int64) * out_stride
    store_statistics(out + i_split.to(tl.int64) * out_stride + o_n, stat_stride, stats, mask_n)


# -------------------------------------------------------------------------------------- second pass


@triton.jit
def load_maxima_and_sums(merged, o_n, rows, merged_stride, HEAD_STATISTICS: tl.constexpr):
    """(BLOCK_N, 1) row_max_s, log2_sum_s, row_max_t, log2_sum_t of the rows `o_n`.

    merged (statistics, merged_stride) has HEAD_STATISTICS rows of each head, the student's first.
    """
    p_s = (merged + tl.minimum(o_n, rows - 1))[:, None]
    p_t = p_s + HEAD_STATISTICS * merged_stride.to(tl.int64)
    row_max_s, row_max_t = tl.load(p_s), tl.load(p_t)
    log2_sum_s = log2(tl.load(p_s + merged_stride))
    return row_max_s, log2_sum_s, row_max_t, log2(tl.load(p_t + merged_stride))


@triton.jit(**JIT_OPTIONS)
def divergence_sums(
    x_s, w_s, epilogue_s, sizes_s,  # as of `statistics`
    x_t, w_t, epilogue_t, sizes_t,
    merged,  # (statistics, merged_stride) fp32 of whole rows
    out,  # (2 or 3, splits, out_stride) fp32
    rows, cols, merged_stride, out_stride,
    beta, one_minus_beta,
    clip,  # largest entry, or None
    span, splits,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_STATISTICS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Value, sum of shares and, with a clip, value without it, over a span of the vocabulary."""
    i_n, i_split = swizzle_pid(tl.cdiv(rows, BLOCK_N), splits, GROUP)
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    row_max_s, log2_sum_s, row_max_t, log2_sum_t = load_maxima_and_sums(
        merged, o_n, rows, merged_stride, HEAD_STATISTICS
    )
    value = tl.zeros((BLOCK_N,), tl.float32)
    sum_share = tl.zeros((BLOCK_N,), tl.float32)
    unclipped = tl.zeros((BLOCK_N,), tl.float32)
    PART_V: tl.constexpr = BLOCK_V // PARTS
    begin = i_split * span * BLOCK_V
    for start_v in range(begin, tl.minimum(begin + span * BLOCK_V, cols), BLOCK_V):
        b_raw_s, b_raw_t = matmul_tile_pair(
            x_s, w_s, sizes_s, x_t, w_t, sizes_t, start_n, start_v, rows, cols,
            BLOCK_N, BLOCK_V, BLOCK_D, SHARED, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
        for i_part in tl.static_range(PARTS):
            part_v = start_v + i_part * PART_V
            b_part_s = column_part(b_raw_s, i_part, PARTS, BLOCK_N, BLOCK_V)
            b_part_t = column_part(b_raw_t, i_part, PARTS, BLOCK_N, BLOCK_V)
            b_z_s, _ = apply_bias_cap_temperature(b_part_s, part_v, cols, epilogue_s, PART_V)
            b_z_t, _ = apply_bias_cap_temperature(b_part_t, part_v, cols, epilogue_t, PART_V)
            b_s = probability(b_z_s, row_max_s, log2_sum_s)
            b_t = probability(b_z_t, row_max_t, log2_sum_t)
            b_d = log_ratio(b_z_t - b_z_s, row_max_s, log2_sum_s, row_max_t, log2_sum_t)
            b_entry, b_share = divergence_terms(b_s, b_t, b_d, beta, one_minus_beta, KIND)
            if clip is not None:
                unclipped += sum_columns(b_entry)
                b_share = tl.where(b_entry > clip, 0.0, b_share)
                b_entry = tl.where(b_entry > clip, clip, b_entry)
            value += sum_columns(b_entry)
            sum_share += sum_columns(b_share)
    sums = (value, sum_share)
    if clip is not None:
        sums += (unclipped,)
    mask_n, stat_stride = o_n < rows, splits.to(tl.int64) * out_stride
    store_statistics(out + i_split.to(tl.int64) * out_stride + o_n, stat_stride, sums, mask_n)
