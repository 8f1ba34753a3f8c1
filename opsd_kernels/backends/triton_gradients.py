"""Fused kernels that write the gradient of the logits, one slice of the vocabulary per launch.

A program multiplies one tile of logits, as in `triton_kernels`, and writes its gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_kernels import (
    JIT_OPTIONS,
    load_label,
    load_maxima_and_sums,
    swizzle_pid,
)
from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    LN_2,
    divergence_grad,
    load_class_weights,
    load_rates,
    log2,
    log_ratio,
    probability,
    stored_grad_scale,
)
from opsd_kernels.backends.triton_tiles import (
    apply_bias_cap_temperature,
    column_part,
    matmul_tile,
    matmul_tile_pair,
)


@triton.jit(**JIT_OPTIONS)
def divergence_gradient(
    x_s, w_s, epilogue_s, sizes_s,  # (rows, D), (cols, D), Epilogue, MatmulSizes
    x_t, w_t, epilogue_t, sizes_t,
    merged,  # (statistics, merged_stride) fp32
    totals,  # (rows,) fp32: sum of shares
    scale,  # (rows,) fp32: gradient of the loss by each value, or None for 1
    dz,  # (rows, stop - start), rows dz_stride apart
    rows, cols, merged_stride, dz_stride,
    beta, one_minus_beta,
    clip,  # largest entry, or None
    start, stop,  # columns of the slice
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_STATISTICS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, for columns start to stop."""
    i_n, i_v = swizzle_pid(tl.cdiv(rows, BLOCK_N), tl.cdiv(stop - start, BLOCK_V), GROUP)
    start_n, start_v = i_n * BLOCK_N, start + i_v * BLOCK_V
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_row = tl.minimum(o_n, rows - 1)
    row_max_s, log2_sum_s, row_max_t, log2_sum_t = load_maxima_and_sums(
        merged, o_n, rows, merged_stride, HEAD_STATISTICS
    )
    sum_share = tl.load(totals + o_row)[:, None]
    factor = stored_grad_scale(dz, epilogue_s.inv_temp)
    if scale is not None:
        factor = (tl.load(scale + o_row) * factor)[:, None]
    if KIND != FORWARD_KL and clip is None:
        # An infinite reverse KL has no gradient (inf - inf): 0 here, the value reports it.
        factor = tl.where(sum_share == float("inf"), 0.0, factor)
        sum_share = tl.where(sum_share == float("inf"), 0.0, sum_share)
    PART_V: tl.constexpr = BLOCK_V // PARTS
    b_raw_s, b_raw_t = matmul_tile_pair(
        x_s, w_s, sizes_s, x_t, w_t, sizes_t, start_n, start_v, rows, cols,
        BLOCK_N, BLOCK_V, BLOCK_D, SHARED, USE_TMA, EVEN_D, PRECISION,
    )  # fmt: skip
    for i_part in tl.static_range(PARTS):
        part_v = start_v + i_part * PART_V
        b_part_s = column_part(b_raw_s, i_part, PARTS, BLOCK_N, BLOCK_V)
        b_part_t = column_part(b_raw_t, i_part, PARTS, BLOCK_N, BLOCK_V)
        b_z_s, slope = apply_bias_cap_temperature(b_part_s, part_v, cols, epilogue_s, PART_V)
        b_z_t, _ = apply_bias_cap_temperature(b_part_t, part_v, cols, epilogue_t, PART_V)
        b_s = probability(b_z_s, row_max_s, log2_sum_s)
        b_t = probability(b_z_t, row_max_t, log2_sum_t)
        b_d = log_ratio(b_z_t - b_z_s, row_max_s, log2_sum_s, row_max_t, log2_sum_t)
        b_dz = divergence_grad(b_s, b_t, b_d, sum_share, clip, beta, one_minus_beta, KIND)
        b_dz = b_dz * slope * factor
        _store_gradient(
            dz, b_dz, start_n, part_v - start, rows, stop - start, dz_stride, BLOCK_N, PART_V
        )


@triton.jit
def _store_gradient(
    dz, b_dz, start_n, start_v, rows, cols, dz_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_v = start_v + tl.arange(0, BLOCK_V)
    p_dz = dz + o_n[:, None].to(tl.int64) * dz_stride + o_v[None, :]
    tl.store(p_dz, b_dz.to(dz.dtype.element_ty), (o_n < rows)[:, None] & (o_v < cols)[None, :])


@triton.jit(**JIT_OPTIONS)
def logprob_gradient(
    x, w, epilogue, sizes,  # (rows, D), (cols, D), Epilogue, MatmulSizes
    class_weight,  # (cols,) fp32, or None
    label,  # (rows,) int64
    merged,  # (statistics, merged_stride) fp32
    rates,  # (2, rows) fp32: sharp and mass of `logprob_terms`, or None where both are 1
    entropy,  # (rows,) fp32, or None
    scale,  # (rows,) fp32: gradient of the loss by each log-probability, or None for 1
    entropy_scale,  # (rows,) fp32: the same by each entropy, or None
    dz,  # (rows, stop - start), rows dz_stride apart
    dz_entropy,  # the same for the entropy's own gradient, or None
    rows, cols, vocab_start, merged_stride, dz_stride,
    uniform,  # label smoothing / vocabulary size
    start, stop,  # columns of the slice
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr,
    USE_TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz = (sharp at the label) + uniform class_weight - mass p, times slope and scale.

    With `entropy_scale` the entropy's gradient is added; with `dz_entropy` it is written there.
    """
    i_n, i_v = swizzle_pid(tl.cdiv(rows, BLOCK_N), tl.cdiv(stop - start, BLOCK_V), GROUP)
    start_n, start_v = i_n * BLOCK_N, start + i_v * BLOCK_V
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_row = tl.minimum(o_n, rows - 1)
    stored_scale = stored_grad_scale(dz, epilogue.inv_temp)
    PART_V: tl.constexpr = BLOCK_V // PARTS
    b_raw = matmul_tile(
        x, w, sizes, start_n, start_v, rows, cols,
        BLOCK_N, BLOCK_V, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
    )  # fmt: skip
    for i_part in tl.static_range(PARTS):
        part_v = start_v + i_part * PART_V
        b_part = column_part(b_raw, i_part, PARTS, BLOCK_N, BLOCK_V)
        b_z, slope = apply_bias_cap_temperature(b_part, part_v, cols, epilogue, PART_V)
        row_max = tl.load(merged + o_row)[:, None]
        log2_sum = log2(tl.load(merged + merged_stride + o_row))[:, None]
        b_p = probability(b_z, row_max, log2_sum)
        y = load_label(label, o_n, rows, cols, vocab_start)
        o_v = part_v + tl.arange(0, PART_V)
        smoothing = uniform
        if class_weight is not None:
            smoothing = (uniform * load_class_weights(class_weight, o_v, cols))[None, :]
        sharp, mass = load_rates(rates, o_row[:, None], rows)
        b_dz = tl.where(o_v[None, :] == y[:, None], sharp, 0.0) + smoothing - mass * b_p
        if scale is not None:
            b_dz *= tl.load(scale + o_row)[:, None]
        if entropy is not None:
            b_log_p = (b_z - row_max) - log2_sum * LN_2
            b_dz_entropy = -b_p * (b_log_p + tl.load(entropy + o_row)[:, None])
            if entropy_scale is not None:
                b_dz += b_dz_entropy * tl.load(entropy_scale + o_row)[:, None]
            if dz_entropy is not None:
                _store_gradient(
                    dz_entropy, b_dz_entropy * slope * stored_scale, start_n, part_v - start, rows,
                    stop - start, dz_stride, BLOCK_N, PART_V,
                )  # fmt: skip
        b_dz = b_dz * slope * stored_scale
        _store_gradient(
            dz, b_dz, start_n, part_v - start, rows, stop - start, dz_stride, BLOCK_N, PART_V
        )
