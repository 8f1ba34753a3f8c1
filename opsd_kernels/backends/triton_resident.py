"""A pair's statistics, sums and gradient in one kernel, which reads the logits once.

The programs of a row each hold one part of it in registers. They exchange the parts' statistics,
then the parts' sums, through an exchange buffer in global memory, and write the gradient over the
logits. A part's statistics are published after its logits are read, so the others may overwrite
them. A team of programs takes one row after another; all programs run at once (a cooperative
launch), and each prefetches its part of the team's next row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LOG_ZERO,
    divergence_grad,
    divergence_terms,
    exp,
    log2,
    log_ratio,
    probability,
    stored_grad_scale,
)
from opsd_kernels.backends.triton_merge import store_statistics
from opsd_kernels.backends.triton_rows import (
    ROW_JIT_OPTIONS,
    load_label_logit,
    row_logits,
    store_head,
)

# A slot of the exchange buffer that is not written yet: a NaN that no arithmetic gives.
EMPTY = 0x7FA5A5A5
_EMPTY = tl.constexpr(EMPTY)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SLOTS = 6  # numbers that a part publishes
_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def _max2(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _merge_parts(max_s, sum_s, max_t, sum_t, other_max_s, other_sum_s, other_max_t, other_sum_t):
    """Maxima and sums of exponentials of two parts, of both heads."""
    new_s, new_t = tl.maximum(max_s, other_max_s), tl.maximum(max_t, other_max_t)
    sum_s = sum_s * exp(max_s - new_s) + other_sum_s * exp(other_max_s - new_s)
    sum_t = sum_t * exp(max_t - new_t) + other_sum_t * exp(other_max_t - new_t)
    return new_s, sum_s, new_t, sum_t


# Several reductions in one, so that the threads of a program synchronize once. The interpreter
# loops over the elements of such a reduction, but not over those of a tl.sum.


@triton.jit
def _block_max2(a, b):
    if _INTERPRETED:
        found = tl.max(a, 0), tl.max(b, 0)
    else:
        found = tl.reduce((a, b), 0, _max2)
    return found


@triton.jit
def _block_sum2(a, b):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0)
    else:
        found = tl.reduce((a, b), 0, _add2)
    return found


@triton.jit
def _block_sum4(a, b, c, d):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
    else:
        found = tl.reduce((a, b, c, d), 0, _add4)
    return found


@triton.jit
def _prefetch(raw, begin, padded, COUNT: tl.constexpr):
    """Bring COUNT logits of a row into L2."""
    if not _INTERPRETED:
        # One address per line of 128 bytes. The result is not used.
        o_v = tl.minimum(begin + tl.arange(0, COUNT // 32) * 32, padded - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [raw + o_v], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


# ------------------------------------------------------------------------------ the exchange buffer


@triton.jit
def _publish(p_slot, value):
    tl.store(p_slot, value.to(tl.int32, bitcast=True))


@triton.jit
def _load_bits(p_slots, mask):
    return tl.load(p_slots, mask=mask, other=0, volatile=True)


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def _as_float(bits, mask, other):
    return tl.where(mask, bits.to(tl.float32, bitcast=True), other)


@triton.jit
def _wait_for_row_constants(slots, parts, MAX_PARTS: tl.constexpr):
    """(row_max, log2_sum) of both heads, as soon as every part of the row has published its own."""
    p_slots = slots + tl.arange(0, MAX_PARTS)
    mask = tl.arange(0, MAX_PARTS) < parts
    a, b = _load_bits(p_slots, mask), _load_bits(p_slots + MAX_PARTS, mask)
    c, d = _load_bits(p_slots + 2 * MAX_PARTS, mask), _load_bits(p_slots + 3 * MAX_PARTS, mask)
    while _any((a == _EMPTY) | (b == _EMPTY) | (c == _EMPTY) | (d == _EMPTY)):
        a, b = _load_bits(p_slots, mask), _load_bits(p_slots + MAX_PARTS, mask)
        c, d = _load_bits(p_slots + 2 * MAX_PARTS, mask), _load_bits(p_slots + 3 * MAX_PARTS, mask)
    b_max_s, b_sum_s = _as_float(a, mask, LOG_ZERO), _as_float(b, mask, 0.0)
    b_max_t, b_sum_t = _as_float(c, mask, LOG_ZERO), _as_float(d, mask, 0.0)
    if _INTERPRETED:
        max_s, max_t = tl.max(b_max_s, 0), tl.max(b_max_t, 0)
        sum_s = tl.sum(b_sum_s * exp(b_max_s - max_s), 0)
        sum_t = tl.sum(b_sum_t * exp(b_max_t - max_t), 0)
    else:
        max_s, sum_s, max_t, sum_t = tl.reduce(
            (b_max_s, b_sum_s, b_max_t, b_sum_t), 0, _merge_parts
        )
    return max_s, log2(sum_s), max_t, log2(sum_t)


@triton.jit
def _wait_for_sum(slots, parts, MAX_PARTS: tl.constexpr):
    """Sum over the parts, as soon as every part of the row has published its own."""
    p_slots = slots + tl.arange(0, MAX_PARTS)
    mask = tl.arange(0, MAX_PARTS) < parts
    bits = _load_bits(p_slots, mask)
    while _any(bits == _EMPTY):
        bits = _load_bits(p_slots, mask)
    return tl.sum(_as_float(bits, mask, 0.0), 0)


# --------------------------------------------------------------------------------------- the kernel


@triton.jit(**ROW_JIT_OPTIONS)
def resident_divergence(
    raw_s, raw_t,  # (rows, padded) fp32 logits, rows `stride` apart
    epilogue_s, epilogue_t,
    label,  # (rows,) int64, or None
    out,  # (statistics, splits, rows) fp32: each part's, as of `row_statistics_pair`; or None
    sums,  # (2, sums_stride) fp32: each row's value and sum of shares; None but for a JSD
    exchange,  # (rows, SLOTS, MAX_PARTS) int32, all EMPTY
    scale,  # (rows,) fp32: gradient of the loss by each value, or None for 1
    dz,  # (rows, padded), rows dz_stride apart: the memory of raw_s
    rows, cols, padded, stride, dz_stride, sums_stride,
    vocab_start,  # of this rank's shard
    beta, one_minus_beta,
    splits,  # parts of a row: programs of a team
    BLOCK_V: tl.constexpr, MAX_PARTS: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, over raw_s."""
    stat_stride = rows.to(tl.int64) * splits
    i_part, teams = tl.program_id(0) % splits, tl.num_programs(0) // splits
    begin = i_part * BLOCK_V
    for i_row in range(tl.program_id(0) // splits, rows, teams):
        i_n = tl.cast(i_row, tl.int32)
        o_row = i_n.to(tl.int64) * stride
        o_next = tl.minimum(i_n + teams, rows - 1).to(tl.int64) * stride
        _prefetch(raw_s + o_next, begin, padded, BLOCK_V)
        _prefetch(raw_t + o_next, begin, padded, BLOCK_V)
        o_v = begin + tl.arange(0, BLOCK_V)
        b_z_s, slope = row_logits(raw_s + o_row, o_v, cols, padded, epilogue_s)
        b_z_t, _ = row_logits(raw_t + o_row, o_v, cols, padded, epilogue_t)
        end, y = begin + BLOCK_V, begin
        if label is not None:
            y = (tl.load(label + i_n) - vocab_start).to(tl.int32)
        label_logit_s = load_label_logit(raw_s + o_row, y, begin, end, cols, epilogue_s)
        label_logit_t = load_label_logit(raw_t + o_row, y, begin, end, cols, epilogue_t)

        # Statistics of this part.
        max_s, max_t = _block_max2(b_z_s, b_z_t)
        max_s, max_t = tl.maximum(max_s, LOG_ZERO), tl.maximum(max_t, LOG_ZERO)
        b_u_s, b_u_t = b_z_s - max_s, b_z_t - max_t
        b_exp_s, b_exp_t = exp(b_u_s), exp(b_u_t)
        sum_exp_logit_s, sum_exp_logit_t = 0.0, 0.0
        if ENTROPY:
            sum_exp_s, sum_exp_t, sum_exp_logit_s, sum_exp_logit_t = _block_sum4(
                b_exp_s, b_exp_t,
                b_exp_s * tl.maximum(b_u_s, LOG_ZERO), b_exp_t * tl.maximum(b_u_t, LOG_ZERO),
            )  # fmt: skip
        else:
            sum_exp_s, sum_exp_t = _block_sum2(b_exp_s, b_exp_t)
        infinite, cross = 0.0, 0.0
        if KIND != JSD:
            if KIND == FORWARD_KL:
                b_gap = b_z_t - b_z_s
                b_cross = b_exp_t * (tl.clamp(b_gap, LOG_ZERO, -LOG_ZERO) - (max_t - max_s))
            else:
                b_gap = b_z_s - b_z_t
                b_cross = b_exp_s * (tl.clamp(b_gap, LOG_ZERO, -LOG_ZERO) - (max_s - max_t))
            cross = tl.sum(b_cross, 0)
            infinite = tl.where(tl.max(b_gap, 0) > -0.5 * LOG_ZERO, 1.0, 0.0)
        if out is not None:
            p_out = out + i_part.to(tl.int64) * rows + i_n
            part_s = max_s, sum_exp_s, sum_exp_logit_s
            part_t = max_t, sum_exp_t, sum_exp_logit_t
            p_out = store_head(p_out, stat_stride, part_s, label_logit_s, label, ENTROPY)
            p_out = store_head(p_out, stat_stride, part_t, label_logit_t, label, ENTROPY)
            if KIND != JSD:
                store_statistics(p_out, stat_stride, (cross, infinite))

        # Statistics of the row. Once this part's are published the others may overwrite its logits:
        # the barrier makes sure that every thread has read them.
        tl.debug_barrier()
        slots = exchange + i_n.to(tl.int64) * (_SLOTS * MAX_PARTS)
        p_own = slots + i_part
        _publish(p_own, max_s)
        _publish(p_own + MAX_PARTS, sum_exp_s)
        _publish(p_own + 2 * MAX_PARTS, max_t)
        _publish(p_own + 3 * MAX_PARTS, sum_exp_t)
        row_max_s, log2_sum_s, row_max_t, log2_sum_t = _wait_for_row_constants(
            slots, splits, MAX_PARTS
        )
        b_s = probability(b_z_s, row_max_s, log2_sum_s)
        b_t = probability(b_z_t, row_max_t, log2_sum_t)
        b_d = log_ratio(b_z_t - b_z_s, row_max_s, log2_sum_s, row_max_t, log2_sum_t)

        # Sums and gradient.
        factor = stored_grad_scale(dz, epilogue_s.inv_temp)
        if scale is not None:
            factor *= tl.load(scale + i_n)
        if KIND == FORWARD_KL:
            b_dz = b_s - b_t
        else:
            b_entry, b_share = divergence_terms(b_s, b_t, b_d, beta, one_minus_beta, KIND)
            value, part_share = _block_sum2(b_entry, b_share)
            if KIND == JSD:
                _publish(p_own + 4 * MAX_PARTS, part_share)
                _publish(p_own + 5 * MAX_PARTS, value)
                sum_share = _wait_for_sum(slots + 4 * MAX_PARTS, splits, MAX_PARTS)
                b_dz = one_minus_beta * (b_s * sum_share - b_share)
                if i_part == 0:
                    value = _wait_for_sum(slots + 5 * MAX_PARTS, splits, MAX_PARTS)
                    store_statistics(sums + i_n, sums_stride, (value, sum_share))
            else:
                _publish(p_own + 4 * MAX_PARTS, tl.where(infinite > 0, float("inf"), value))
                total = _wait_for_sum(slots + 4 * MAX_PARTS, splits, MAX_PARTS)
                # An infinite reverse KL has no gradient (inf - inf): 0 here, the value reports it.
                factor = tl.where(total == float("inf"), 0.0, factor)
                total = tl.where(total == float("inf"), 0.0, total)
                b_dz = divergence_grad(b_s, b_t, b_d, total, None, beta, one_minus_beta, KIND)
        b_dz = (b_dz * slope * factor).to(dz.dtype.element_ty)
        tl.store(dz + i_n.to(tl.int64) * dz_stride + o_v, b_dz, mask=o_v < padded)
