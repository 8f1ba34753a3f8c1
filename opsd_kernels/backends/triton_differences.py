"""Kernels on 16-bit differences of a pair's logits, which take the place of the fp32 logits.

A row is cut into tiles of BLOCK_V columns, whose maxima are kept in fp32. Relative to them
u_s <= 0 and u_t <= 0, and two fp16 numbers describe a column: `larger` = max(u_s, u_t) and
`gap` = u_t - u_s. fp16 is finest near 0, so the probabilities near the tile's maximum lose least;
a close pair keeps its digits, because the gap itself is stored. If one side is banned, the gap is
infinite and `larger` is the other side.
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
    divergence_grad,
    divergence_terms,
    exp,
    stored_grad_scale,
)
from opsd_kernels.backends.triton_rows import (
    ROW_JIT_OPTIONS,
    by_lane,
    lane_sum,
    load_label_logit,
    load_row_constants,
    row_logits,
    store_head,
)

JIT_OPTIONS = {
    "do_not_specialize": [*ROW_JIT_OPTIONS["do_not_specialize"], "first_tile", "tiles"],
    "do_not_specialize_on_alignment": [
        *ROW_JIT_OPTIONS["do_not_specialize_on_alignment"], "parts",
    ],
}  # fmt: skip


@triton.jit(**JIT_OPTIONS)
def difference_statistics(
    raw_s, raw_t,  # (rows, padded) fp32 logits of a slice, rows `stride` apart
    epilogue_s, epilogue_t,
    label,  # (rows,) int64, or None
    parts,  # (statistics, tiles, rows) fp32
    larger, gap,  # (rows, padded vocabulary) fp16, rows code_stride apart
    rows, cols, padded, stride, code_stride,
    vocab_start,  # of the slice
    first_tile,  # of the slice
    tiles,  # of the vocabulary
    BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Differences of one tile of a row, and its statistics as of `row_statistics_pair`."""
    i_n, i_tile = tl.program_id(0) % rows, tl.program_id(0) // rows
    raw_s += i_n.to(tl.int64) * stride
    raw_t += i_n.to(tl.int64) * stride
    begin = i_tile * BLOCK_V
    o_v = begin + tl.arange(0, BLOCK_V)
    b_z_s, _ = row_logits(raw_s, o_v, cols, padded, epilogue_s)
    b_z_t, _ = row_logits(raw_t, o_v, cols, padded, epilogue_t)
    max_s, max_t = tl.maximum(tl.max(b_z_s, 0), LOG_ZERO), tl.maximum(tl.max(b_z_t, 0), LOG_ZERO)
    b_u_s, b_u_t = b_z_s - max_s, b_z_t - max_t
    b_gap = (b_z_t - b_z_s) - (max_t - max_s)
    b_gap = tl.where(b_gap == b_gap, b_gap, float("-inf"))  # NaN if both are banned
    o_code = i_n.to(tl.int64) * code_stride + first_tile * BLOCK_V + o_v
    b_larger = tl.where(b_gap > 0, b_u_t, b_u_s)
    tl.store(larger + o_code, b_larger.to(tl.float16), mask=o_v < padded)
    tl.store(gap + o_code, b_gap.to(tl.float16), mask=o_v < padded)
    b_exp_s, b_exp_t = exp(b_u_s), exp(b_u_t)
    b_u_s, b_u_t = tl.maximum(b_u_s, LOG_ZERO), tl.maximum(b_u_t, LOG_ZERO)
    y, end = begin, begin + BLOCK_V
    if label is not None:
        y = (tl.load(label + i_n) - vocab_start).to(tl.int32)
    stat_stride = tiles.to(tl.int64) * rows
    p_out = parts + (first_tile + i_tile).to(tl.int64) * rows + i_n
    label_logit = load_label_logit(raw_s, y, begin, end, cols, epilogue_s)
    tile_s = (max_s, tl.sum(b_exp_s, 0), tl.sum(b_exp_s * b_u_s, 0))
    p_out = store_head(p_out, stat_stride, tile_s, label_logit, label, ENTROPY)
    label_logit = load_label_logit(raw_t, y, begin, end, cols, epilogue_t)
    tile_t = (max_t, tl.sum(b_exp_t, 0), tl.sum(b_exp_t * b_u_t, 0))
    p_out = store_head(p_out, stat_stride, tile_t, label_logit, label, ENTROPY)
    if KIND != JSD:
        if KIND == FORWARD_KL:
            b_cross = b_exp_t * tl.clamp(b_gap, LOG_ZERO, -LOG_ZERO)
            b_raw_gap = b_z_t - b_z_s
        else:
            b_cross = b_exp_s * tl.clamp(-b_gap, LOG_ZERO, -LOG_ZERO)
            b_raw_gap = b_z_s - b_z_t
        tl.store(p_out, tl.sum(b_cross, 0))
        infinite = tl.where(tl.max(b_raw_gap, 0) > -0.5 * LOG_ZERO, 1.0, 0.0)
        tl.store(p_out + stat_stride, infinite)


@triton.jit
def _decode(
    larger, gap, parts, o_code, i_n, rows, i_tile, tiles,
    row_max_s, log2_sum_s, row_max_t, log2_sum_t, mask, HEAD_STATISTICS: tl.constexpr,
):  # fmt: skip
    """(s, t, log(t / s), z_s) of a tile from its differences and its maxima in `parts`."""
    p_max = parts + i_tile * rows + i_n
    max_s = tl.load(p_max)
    max_t = tl.load(p_max + HEAD_STATISTICS * tiles.to(tl.int64) * rows)
    b_larger = tl.load(larger + o_code, mask=mask, other=float("-inf")).to(tl.float32)
    b_d = tl.load(gap + o_code, mask=mask, other=float("-inf")).to(tl.float32)
    b_u_s, b_u_t = b_larger - tl.maximum(b_d, 0.0), b_larger + tl.minimum(b_d, 0.0)
    b_s = tl.exp2(b_u_s * LOG2_E + ((max_s - row_max_s) * LOG2_E - log2_sum_s))
    b_t = tl.exp2(b_u_t * LOG2_E + ((max_t - row_max_t) * LOG2_E - log2_sum_t))
    b_d += ((max_t - max_s) - (row_max_t - row_max_s)) - (log2_sum_t - log2_sum_s) * LN_2
    return b_s, b_t, b_d, b_u_s + max_s


@triton.jit(**JIT_OPTIONS)
def difference_sums(
    larger, gap,  # (rows, padded) fp16, rows code_stride apart
    parts,  # (statistics, tiles, rows) fp32 of the tiles
    merged,  # (statistics, merged_stride) fp32 of whole rows
    out,  # (3, splits, rows) fp32
    rows, padded, code_stride, merged_stride,
    beta, one_minus_beta,
    span,  # tiles per program
    splits,  # programs per row
    tiles,  # of the vocabulary
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, HEAD_STATISTICS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Value, sum of the terms of K (shares of a JSD, entries of a KL) and sum of s, over a span."""
    i_n, i_split = tl.program_id(0) % rows, tl.program_id(0) // rows
    larger += i_n.to(tl.int64) * code_stride
    gap += i_n.to(tl.int64) * code_stride
    row_max_s, log2_sum_s, row_max_t, log2_sum_t = load_row_constants(
        merged, i_n, merged_stride, HEAD_STATISTICS
    )
    value = tl.zeros((LANES,), tl.float32)
    sum_share = tl.zeros((LANES,), tl.float32)
    sum_s = tl.zeros((LANES,), tl.float32)
    for i_tile in range(i_split * span, tl.minimum(i_split * span + span, tiles)):
        o_v = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        b_s, b_t, b_d, _ = _decode(
            larger, gap, parts, o_v, i_n, rows, i_tile, tiles,
            row_max_s, log2_sum_s, row_max_t, log2_sum_t, o_v < padded, HEAD_STATISTICS,
        )  # fmt: skip
        b_entry, b_share = divergence_terms(b_s, b_t, b_d, beta, one_minus_beta, KIND)
        if KIND != JSD:
            b_share = b_entry
        value += lane_sum(by_lane(b_entry, LANES, 8))
        sum_share += lane_sum(by_lane(b_share, LANES, 8))
        sum_s += lane_sum(by_lane(b_s, LANES, 8))
    p_out = out + i_split.to(tl.int64) * rows + i_n
    sum_stride = splits.to(tl.int64) * rows
    tl.store(p_out, tl.sum(value, 0))
    tl.store(p_out + sum_stride, tl.sum(sum_share, 0))
    tl.store(p_out + 2 * sum_stride, tl.sum(sum_s, 0))


@triton.jit(**JIT_OPTIONS)
def difference_gradient(
    larger, gap,  # (rows, padded) fp16, rows code_stride apart
    parts,  # (statistics, tiles, rows) fp32 of the tiles
    softcap_s,  # of the student, or None
    inv_temp_s,  # 1 / temperature of the student
    merged,  # (statistics, merged_stride) fp32 of whole rows
    totals,  # (rows,) fp32: K of the gradient
    scale,  # (rows,) fp32: gradient of the loss by each value, or None for 1
    dz,  # (rows, padded), rows code_stride apart: the memory of `larger`
    rows, padded, code_stride, merged_stride,
    beta, one_minus_beta, span, tiles,
    BLOCK_V: tl.constexpr, HEAD_STATISTICS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, over `larger`."""
    i_n, i_split = tl.program_id(0) % rows, tl.program_id(0) // rows
    o_row = i_n.to(tl.int64) * code_stride
    row_max_s, log2_sum_s, row_max_t, log2_sum_t = load_row_constants(
        merged, i_n, merged_stride, HEAD_STATISTICS
    )
    total = tl.load(totals + i_n)
    factor = stored_grad_scale(dz, inv_temp_s)
    if scale is not None:
        factor *= tl.load(scale + i_n)
    if KIND != FORWARD_KL:
        # An infinite reverse KL has no gradient (inf - inf): 0 here, the value reports it.
        factor = tl.where(total == float("inf"), 0.0, factor)
        total = tl.where(total == float("inf"), 0.0, total)
    for i_tile in range(i_split * span, tl.minimum(i_split * span + span, tiles)):
        o_v = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        b_s, b_t, b_d, b_z_s = _decode(
            larger, gap, parts, o_row + o_v, i_n, rows, i_tile, tiles,
            row_max_s, log2_sum_s, row_max_t, log2_sum_t, o_v < padded, HEAD_STATISTICS,
        )  # fmt: skip
        b_dz = divergence_grad(b_s, b_t, b_d, total, None, beta, one_minus_beta, KIND) * factor
        if softcap_s is not None:
            b_tanh = b_z_s * (1.0 / (inv_temp_s * softcap_s))
            b_dz *= tl.where(b_s > 0, 1.0 - b_tanh * b_tanh, 0.0)
        tl.store(dz + o_row + o_v, b_dz.to(dz.dtype.element_ty), mask=o_v < padded)
