"""Kernels that turn rows of logits into the logits' gradient, in place.

A program owns a whole row and walks it upward. The gradient may be narrower than the float32
logits it takes the place of: what a step writes was read in an earlier step, or in this one before
the barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    FP16_BOOST,
    LN_2,
    LOG_ZERO,
    class_weights,
    divergence_slope,
    gradient_unit,
    jsd_terms,
    log2,
    log_ratio,
    probability,
    rates_of,
)
from opsd_kernels.backends.triton_rows import (
    ROW_NUMBERS,
    by_lane,
    lane_sum,
    row_constants,
    row_logits,
)


@triton.jit(**ROW_NUMBERS)
def row_divergence_gradient(
    z_s, z_t, bias_s, cap_s, inv_temp_s, bias_t, cap_t, inv_temp_t, merged, totals, scale, dz, cols,
    padded, stride, dz_stride, width, beta, rest, clip,
    BLOCK_V: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, over z_s."""
    row = tl.program_id(0)
    z_s += row.to(tl.int64) * stride
    z_t += row.to(tl.int64) * stride
    dz += row.to(tl.int64) * dz_stride
    top_s, log2_s, top_t, log2_t = row_constants(merged, row, width, STEP)
    total = tl.load(totals + row)
    factor = gradient_unit(dz, inv_temp_s)
    if scale is not None:
        factor *= tl.load(scale + row)
    if KIND != FORWARD_KL and clip is None:
        # Of an infinite reverse KL inf - inf has no direction; the value reports it.
        factor = tl.where(total == float("inf"), 0.0, factor)
        total = tl.where(total == float("inf"), 0.0, total)
    for col in range(0, padded, BLOCK_V):
        c = col + tl.arange(0, BLOCK_V)
        x_s, slope = row_logits(z_s, c, cols, padded, bias_s, cap_s, inv_temp_s)
        x_t, _ = row_logits(z_t, c, cols, padded, bias_t, cap_t, inv_temp_t)
        s, t = probability(x_s, top_s, log2_s), probability(x_t, top_t, log2_t)
        d = log_ratio(x_s, x_t, top_s, log2_s, top_t, log2_t)
        grad = divergence_slope(s, t, d, total, clip, beta, rest, KIND) * slope * factor
        tl.debug_barrier()
        tl.store(dz + c, grad.to(dz.dtype.element_ty), mask=c < padded)


@triton.jit(**ROW_NUMBERS)
def row_jsd_shares(
    z_s, z_t, bias_s, cap_s, inv_temp_s, bias_t, cap_t, inv_temp_t, merged, center, out, share,
    chance, rows, cols, padded, stride, dz_stride, width, beta, rest,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Value of the JSD and sum of s (q - center), q = log(m/s); both factors over the logits.

    The gradient rest s (K - q) is linear in the two: K - center is the sum, known at the end.
    """
    row = tl.program_id(0)
    z_s += row.to(tl.int64) * stride
    z_t += row.to(tl.int64) * stride
    share += row.to(tl.int64) * dz_stride
    chance += row.to(tl.int64) * dz_stride
    top_s, log2_s, top_t, log2_t = row_constants(merged, row, width, STEP)
    middle = tl.load(center + row)
    value = tl.zeros((LANES,), tl.float32)
    shares = tl.zeros((LANES,), tl.float32)
    for col in range(0, padded, BLOCK_V):
        c = col + tl.arange(0, BLOCK_V)
        x_s, slope = row_logits(z_s, c, cols, padded, bias_s, cap_s, inv_temp_s)
        x_t, _ = row_logits(z_t, c, cols, padded, bias_t, cap_t, inv_temp_t)
        s, t = probability(x_s, top_s, log2_s), probability(x_t, top_t, log2_t)
        d, q = jsd_terms(log_ratio(x_s, x_t, top_s, log2_s, top_t, log2_t), beta, rest)
        centered = s * (q - middle)
        value += lane_sum(by_lane(beta * t * (d - q) - rest * (s * q), LANES, 8))
        shares += lane_sum(by_lane(centered, LANES, 8))
        tl.debug_barrier()
        kind = share.dtype.element_ty
        if kind == tl.float16:
            centered *= FP16_BOOST
        tl.store(share + c, (centered * slope).to(kind), mask=c < padded)
        tl.store(chance + c, (s * slope).to(kind), mask=c < padded)
    tl.store(out + row, tl.sum(value, 0))
    tl.store(out + rows.to(tl.int64) + row, tl.sum(shares, 0))


@triton.jit(**ROW_NUMBERS)
def row_logprob_gradient(
    z, bias, softcap, inv_temp, class_weight, label, merged, rates, entropy, scale, entropy_scale,
    dz, dz_entropy, rows, cols, padded, stride, dz_stride, entropy_stride, width, first, uniform,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(sharp at the label) + uniform class_weight - mass p, chained to the raw logits, over z.

    rates (2, rows): each row's sharp and mass, see `logprob_terms`; None where both are 1.
    The entropy's gradient is added where its scale is known, or written to dz_entropy.
    """
    row = tl.program_id(0)
    z += row.to(tl.int64) * stride
    dz += row.to(tl.int64) * dz_stride
    top, log2_total = tl.load(merged + row), log2(tl.load(merged + width + row))
    y = (tl.load(label + row) - first).to(tl.int32)
    sharp, mass = rates_of(rates, row, rows)
    unit = gradient_unit(dz, inv_temp)
    factor = unit
    if scale is not None:
        factor *= tl.load(scale + row)
    for col in range(0, padded, BLOCK_V):
        c = col + tl.arange(0, BLOCK_V)
        x, slope = row_logits(z, c, cols, padded, bias, softcap, inv_temp)
        share = uniform
        if class_weight is not None:
            share = uniform * class_weights(class_weight, c, cols)
        p = probability(x, top, log2_total)
        grad = (tl.where(c == y, sharp, 0.0) + share - mass * p) * factor
        if entropy is not None:
            log_p = tl.maximum((x - top) - log2_total * LN_2, LOG_ZERO)
            rise = -p * (log_p + tl.load(entropy + row)) * unit
            if entropy_scale is not None:
                grad += rise * tl.load(entropy_scale + row)
            if dz_entropy is not None:
                at = dz_entropy + row.to(tl.int64) * entropy_stride + c
                tl.store(at, (rise * slope).to(dz_entropy.dtype.element_ty), mask=c < padded)
        tl.debug_barrier()
        tl.store(dz + c, (grad * slope).to(dz.dtype.element_ty), mask=c < padded)
