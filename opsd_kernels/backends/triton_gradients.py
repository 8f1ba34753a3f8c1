"""Fused kernels that write the gradient of the logits for one slice of the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_kernels import (
    HOW,
    constants,
    labels_of,
    place,
    tiles_of,
)
from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    LN_2,
    class_weights,
    divergence_slope,
    gradient_unit,
    log2,
    log_ratio,
    probability,
    rates_of,
)
from opsd_kernels.backends.triton_tiles import finished, part_of, product


@triton.jit(**HOW)
def divergence_gradient(
    x_s, w_s, bias_s, cap_s, inv_temp_s, depth_s, s_row, s_k, ws_row, ws_k,
    x_t, w_t, bias_t, cap_t, inv_temp_t, depth_t, t_row, t_k, wt_row, wt_k,
    merged, totals, scale, grad, rows, cols, width, grad_row, beta, rest, clip,
    start, stop,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SHARED: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits, times the row's scale, for columns start to stop."""
    block, tile = place(tl.cdiv(rows, R), tl.cdiv(stop - start, C), GROUP)
    row, col = block * R, start + tile * C
    r = row + tl.arange(0, R)
    at = tl.minimum(r, rows - 1)
    top_s, log2_s, top_t, log2_t = constants(merged, r, rows, width, STEP)
    total = tl.load(totals + at)[:, None]
    factor = gradient_unit(grad, inv_temp_s)
    if scale is not None:
        factor = (tl.load(scale + at) * factor)[:, None]
    if KIND != FORWARD_KL and clip is None:
        # Of an infinite reverse KL inf - inf has no direction; the value reports it.
        factor = tl.where(total == float("inf"), 0.0, factor)
        total = tl.where(total == float("inf"), 0.0, total)
    PART: tl.constexpr = C // PARTS
    raw_s, raw_t = tiles_of(
        x_s, w_s, depth_s, s_row, s_k, ws_row, ws_k,
        x_t, w_t, depth_t, t_row, t_k, wt_row, wt_k, row, col, rows, cols,
        R, C, K, SHARED, DESCRIBED, EVEN, PRECISION,
    )  # fmt: skip
    for part in tl.static_range(PARTS):
        c = col + part * PART
        part_s = part_of(raw_s, part, PARTS, R, C)
        part_t = part_of(raw_t, part, PARTS, R, C)
        z_s, slope = finished(part_s, c, cols, bias_s, cap_s, inv_temp_s, PART)
        z_t, _ = finished(part_t, c, cols, bias_t, cap_t, inv_temp_t, PART)
        s, t = probability(z_s, top_s, log2_s), probability(z_t, top_t, log2_t)
        d = log_ratio(z_s, z_t, top_s, log2_s, top_t, log2_t)
        dz = divergence_slope(s, t, d, total, clip, beta, rest, KIND) * slope * factor
        _store_gradient(grad, dz, row, c - start, rows, stop - start, grad_row, R, PART)


@triton.jit
def _store_gradient(grad, dz, row, col, rows, cols, grad_row, R: tl.constexpr, C: tl.constexpr):
    r = row + tl.arange(0, R)
    c = col + tl.arange(0, C)
    at = grad + r[:, None].to(tl.int64) * grad_row + c[None, :]
    tl.store(at, dz.to(grad.dtype.element_ty), (r < rows)[:, None] & (c < cols)[None, :])


@triton.jit(**HOW)
def logprob_gradient(
    x, w, bias, softcap, inv_temp, depth, x_row, x_k, w_row, w_k,
    class_weight, label, merged, rates, entropy, scale, entropy_scale, grad, grad_entropy, rows,
    cols, offset, width, grad_row, uniform, start, stop,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(sharp at the label) + uniform class_weight - mass p, chained to the raw logits.

    rates (2, rows): each row's sharp and mass, see `logprob_terms`; None where both are 1.
    For columns start to stop.
    The entropy's gradient is added where its scale is known, or written to grad_entropy.
    """
    block, tile = place(tl.cdiv(rows, R), tl.cdiv(stop - start, C), GROUP)
    row, col = block * R, start + tile * C
    r = row + tl.arange(0, R)
    at = tl.minimum(r, rows - 1)
    unit = gradient_unit(grad, inv_temp)
    PART: tl.constexpr = C // PARTS
    raw = product(
        x, w, row, col, rows, cols, depth, x_row, x_k, w_row, w_k,
        R, C, K, DESCRIBED, EVEN, PRECISION,
    )  # fmt: skip
    for part in tl.static_range(PARTS):
        c = col + part * PART
        piece = part_of(raw, part, PARTS, R, C)
        z, slope = finished(piece, c, cols, bias, softcap, inv_temp, PART)
        top = tl.load(merged + at)[:, None]
        log2_total = log2(tl.load(merged + width + at))[:, None]
        p = probability(z, top, log2_total)
        y = labels_of(label, r, rows, cols, offset)
        columns = c + tl.arange(0, PART)
        share = uniform
        if class_weight is not None:
            share = (uniform * class_weights(class_weight, columns, cols))[None, :]
        sharp, mass = rates_of(rates, at[:, None], rows)
        dz = tl.where(columns[None, :] == y[:, None], sharp, 0.0) + share - mass * p
        if scale is not None:
            dz *= tl.load(scale + at)[:, None]
        if entropy is not None:
            log_p = (z - top) - log2_total * LN_2
            rise = -p * (log_p + tl.load(entropy + at)[:, None])
            if entropy_scale is not None:
                dz += rise * tl.load(entropy_scale + at)[:, None]
            if grad_entropy is not None:
                _store_gradient(
                    grad_entropy, rise * slope * unit, row, c - start, rows, stop - start,
                    grad_row, R, PART,
                )  # fmt: skip
        dz = dz * slope * unit
        _store_gradient(grad, dz, row, c - start, rows, stop - start, grad_row, R, PART)
