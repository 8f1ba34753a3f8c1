"""Kernels that turn rows of stored logits into the logits' gradient, in place.

A program owns a whole row and walks it upward. The gradient may be narrower than the fp32 logits it
overwrites: the bytes that a step writes were read in an earlier step, or in this one before the
barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    FP16_BOOST,
    LN_2,
    LOG_ZERO,
    divergence_grad,
    jsd_terms,
    load_class_weights,
    load_rates,
    log2,
    log_ratio,
    probability,
    stored_grad_scale,
)
from opsd_kernels.backends.triton_rows import (
    ROW_JIT_OPTIONS,
    by_lane,
    lane_sum,
    load_row_constants,
    row_logits,
)


@triton.jit(**ROW_JIT_OPTIONS)
def row_divergence_gradient(
    raw_s, raw_t,  # (rows, padded) fp32 logits, rows `stride` apart
    epilogue_s, epilogue_t,
    merged,  # (statistics, merged_stride) fp32
    totals,  # (rows,) fp32: sum of shares
    scale,  # (rows,) fp32: gradient of the loss by each value, or None for 1
    dz,  # (rows, padded), rows dz_stride apart: the memory of raw_s
    cols, padded, stride, dz_stride, merged_stride,
    beta, one_minus_beta,
    clip,  # largest entry, or None
    BLOCK_V: tl.constexpr, HEAD_STATISTICS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, over raw_s."""
    i_n = tl.program_id(0)
    raw_s += i_n.to(tl.int64) * stride
    raw_t += i_n.to(tl.int64) * stride
    dz += i_n.to(tl.int64) * dz_stride
    row_max_s, log2_sum_s, row_max_t, log2_sum_t = load_row_constants(
        merged, i_n, merged_stride, HEAD_STATISTICS
    )
    sum_share = tl.load(totals + i_n)
    factor = stored_grad_scale(dz, epilogue_s.inv_temp)
    if scale is not None:
        factor *= tl.load(scale + i_n)
    if KIND != FORWARD_KL and clip is None:
        # An infinite reverse KL has no gradient (inf - inf): 0 here, the value reports it.
        factor = tl.where(sum_share == float("inf"), 0.0, factor)
        sum_share = tl.where(sum_share == float("inf"), 0.0, sum_share)
    for start_v in range(0, padded, BLOCK_V):
        o_v = start_v + tl.arange(0, BLOCK_V)
        b_z_s, slope = row_logits(raw_s, o_v, cols, padded, epilogue_s)
        b_z_t, _ = row_logits(raw_t, o_v, cols, padded, epilogue_t)
        b_s = probability(b_z_s, row_max_s, log2_sum_s)
        b_t = probability(b_z_t, row_max_t, log2_sum_t)
        b_d = log_ratio(b_z_t - b_z_s, row_max_s, log2_sum_s, row_max_t, log2_sum_t)
        b_dz = divergence_grad(b_s, b_t, b_d, sum_share, clip, beta, one_minus_beta, KIND)
        b_dz = b_dz * slope * factor
        tl.debug_barrier()
        tl.store(dz + o_v, b_dz.to(dz.dtype.element_ty), mask=o_v < padded)


@triton.jit(**ROW_JIT_OPTIONS)
def row_jsd_shares(
    raw_s, raw_t,  # (rows, padded) fp32 logits, rows `stride` apart
    epilogue_s, epilogue_t,
    merged,  # (statistics, merged_stride) fp32
    center,  # (rows,) fp32
    out,  # (2, rows) fp32
    share,  # (rows, padded), rows dz_stride apart: the memory of raw_s
    chance,  # the same: the memory of raw_t
    rows, cols, padded, stride, dz_stride, merged_stride,
    beta, one_minus_beta,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, HEAD_STATISTICS: tl.constexpr,
):  # fmt: skip
    """Value of the JSD and sum of s (q - center), with q = log(m / s), into `out`.

    s (q - center) goes to `share` and s to `chance`, both times the softcap's slope. The gradient
    (1 - beta) s (K - q) is linear in the two, and K - center is the sum, known at the end.
    """
    i_n = tl.program_id(0)
    raw_s += i_n.to(tl.int64) * stride
    raw_t += i_n.to(tl.int64) * stride
    share += i_n.to(tl.int64) * dz_stride
    chance += i_n.to(tl.int64) * dz_stride
    row_max_s, log2_sum_s, row_max_t, log2_sum_t = load_row_constants(
        merged, i_n, merged_stride, HEAD_STATISTICS
    )
    row_center = tl.load(center + i_n)
    value = tl.zeros((LANES,), tl.float32)
    sum_share = tl.zeros((LANES,), tl.float32)
    for start_v in range(0, padded, BLOCK_V):
        o_v = start_v + tl.arange(0, BLOCK_V)
        b_z_s, slope = row_logits(raw_s, o_v, cols, padded, epilogue_s)
        b_z_t, _ = row_logits(raw_t, o_v, cols, padded, epilogue_t)
        b_s = probability(b_z_s, row_max_s, log2_sum_s)
        b_t = probability(b_z_t, row_max_t, log2_sum_t)
        b_d = log_ratio(b_z_t - b_z_s, row_max_s, log2_sum_s, row_max_t, log2_sum_t)
        b_d, b_q = jsd_terms(b_d, beta, one_minus_beta)
        b_share = b_s * (b_q - row_center)
        b_entry = beta * b_t * (b_d - b_q) - one_minus_beta * (b_s * b_q)
        value += lane_sum(by_lane(b_entry, LANES, 8))
        sum_share += lane_sum(by_lane(b_share, LANES, 8))
        tl.debug_barrier()
        dtype = share.dtype.element_ty
        if dtype == tl.float16:
            b_share *= FP16_BOOST
        tl.store(share + o_v, (b_share * slope).to(dtype), mask=o_v < padded)
        tl.store(chance + o_v, (b_s * slope).to(dtype), mask=o_v < padded)
    tl.store(out + i_n, tl.sum(value, 0))
    tl.store(out + rows.to(tl.int64) + i_n, tl.sum(sum_share, 0))


@triton.jit(**ROW_JIT_OPTIONS)
def row_logprob_gradient(
    raw,  # (rows, padded) fp32 logits, rows `stride` apart
    epilogue,  # Epilogue
    class_weight,  # (cols,) fp32, or None
    label,  # (rows,) int64
    merged,  # (statistics, merged_stride) fp32
    rates,  # (2, rows) fp32: sharp and mass of `logprob_terms`, or None where both are 1
    entropy,  # (rows,) fp32, or None
    scale,  # (rows,) fp32: gradient of the loss by each log-probability, or None for 1
    entropy_scale,  # (rows,) fp32: the same by each entropy, or None
    dz,  # (rows, padded), rows dz_stride apart: the memory of raw
    dz_entropy,  # (rows, padded), rows entropy_stride apart, for the entropy's own, or None
    rows, cols, padded, stride, dz_stride, entropy_stride, merged_stride, vocab_start,
    uniform,  # label smoothing / vocabulary size
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz = (sharp at the label) + uniform class_weight - mass p, times slope and scale, over raw.

    With `entropy_scale` the entropy's gradient is added; with `dz_entropy` it is written there.
    """
    i_n = tl.program_id(0)
    raw += i_n.to(tl.int64) * stride
    dz += i_n.to(tl.int64) * dz_stride
    row_max, log2_sum = tl.load(merged + i_n), log2(tl.load(merged + merged_stride + i_n))
    y = (tl.load(label + i_n) - vocab_start).to(tl.int32)
    sharp, mass = load_rates(rates, i_n, rows)
    stored_scale = stored_grad_scale(dz, epilogue.inv_temp)
    factor = stored_scale
    if scale is not None:
        factor *= tl.load(scale + i_n)
    for start_v in range(0, padded, BLOCK_V):
        o_v = start_v + tl.arange(0, BLOCK_V)
        b_z, slope = row_logits(raw, o_v, cols, padded, epilogue)
        smoothing = uniform
        if class_weight is not None:
            smoothing = uniform * load_class_weights(class_weight, o_v, cols)
        b_p = probability(b_z, row_max, log2_sum)
        b_dz = (tl.where(o_v == y, sharp, 0.0) + smoothing - mass * b_p) * factor
        if entropy is not None:
            b_log_p = tl.maximum((b_z - row_max) - log2_sum * LN_2, LOG_ZERO)
            b_dz_entropy = -b_p * (b_log_p + tl.load(entropy + i_n)) * stored_scale
            if entropy_scale is not None:
                b_dz += b_dz_entropy * tl.load(entropy_scale + i_n)
            if dz_entropy is not None:
                p_dz = dz_entropy + i_n.to(tl.int64) * entropy_stride + o_v
                dtype = dz_entropy.dtype.element_ty
                tl.store(p_dz, (b_dz_entropy * slope).to(dtype), mask=o_v < padded)
        tl.debug_barrier()
        tl.store(dz + o_v, (b_dz * slope).to(dz.dtype.element_ty), mask=o_v < padded)
