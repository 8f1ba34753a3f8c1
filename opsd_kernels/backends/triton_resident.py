"""A pair's statistics, sums and gradient in one kernel, which reads the logits once.

The programs of a row each hold one part of it in registers. They exchange the parts' statistics,
then the parts' sums, through an exchange buffer in global memory, and write the gradient over the
logits. A team of programs takes one row after another; all programs run at once (a cooperative
launch). A row's sums are told while the next row is read, so by the time that its gradient is due
few programs wait:

    read row i; publish its statistics
    wait for the sums of row i - 1; write its gradient
    wait for the statistics of row i; publish its sums

A part's statistics depend on all of its logits, so when they are there, the logits have been read
and the others may overwrite them.

FAST is for 16-bit gradients and, of JSDs, those with a beta from 0.1 to 0.9: maxima, d = log(t / s)
and the value are of base 2, and log(m / s) has fewer instructions.
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
    exp,
    jsd_terms,
    log2,
    log2_mixture,
    log_ratio,
    probability,
    softcap_slope,
    stored_grad_scale,
)
from opsd_kernels.backends.triton_merge import store_statistics
from opsd_kernels.backends.triton_reductions import (
    block_max2,
    block_sum2,
    block_sum3_max,
    block_sum4,
    block_sum5_max,
)
from opsd_kernels.backends.triton_rows import (
    ROW_JIT_OPTIONS,
    load_label_logit,
    row_logits,
    store_head,
)

# A slot of the exchange buffer that is not written yet: a NaN that no arithmetic gives.
EMPTY = 0x7FA5A5A5
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SLOTS = 6  # numbers that a part publishes
_SLOTS = tl.constexpr(SLOTS)
# exp2(115) is finite, and 1 + exp2(115) == exp2(115).
_FAR = tl.constexpr(115.0)


@triton.jit
def _shifted(b_z, row_max, FAST: tl.constexpr):
    """z - row_max, both of base 2 with FAST."""
    return tl.fma(b_z, LOG2_E, -row_max) if FAST else b_z - row_max


@triton.jit
def _power(x, FAST: tl.constexpr):
    """The inverse of the logarithm."""
    return tl.exp2(x) if FAST else exp(x)


# ------------------------------------------------------------------------------ the exchange buffer


@triton.jit
def _publish(p_slot, values, MAX_PARTS: tl.constexpr):
    """Tell the other parts a tuple of numbers: the slots of each are MAX_PARTS apart."""
    for i in tl.static_range(len(values)):
        tl.store(p_slot + i * MAX_PARTS, values[i].to(tl.int32, bitcast=True))


@triton.jit
def _wait_for(slots, parts, other, MAX_PARTS: tl.constexpr):
    """(MAX_PARTS,) what the parts have published, each as soon as it is there; else `other`."""
    o_part = tl.arange(0, MAX_PARTS)
    p_slots = slots + tl.minimum(o_part, parts - 1)
    if _INTERPRETED:
        bits = tl.load(p_slots)
    else:
        # Each thread waits for its own slot: no thread needs another's answer to read again.
        bits = tl.inline_asm_elementwise(
            """{
            .reg .pred empty;
            again:
            ld.relaxed.gpu.global.b32 $0, [$1];
            setp.eq.s32 empty, $0, 0x7FA5A5A5;
            @empty bra again;
            }""",
            "=r,l", [p_slots], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return tl.where(o_part < parts, bits.to(tl.float32, bitcast=True), other)


@triton.jit
def _merge_parts(max_s, sum_s, max_t, sum_t, other_max_s, other_sum_s, other_max_t, other_sum_t):
    """Maxima and sums of exponentials of two parts, of both heads."""
    new_s, new_t = tl.maximum(max_s, other_max_s), tl.maximum(max_t, other_max_t)
    sum_s = sum_s * exp(max_s - new_s) + other_sum_s * exp(other_max_s - new_s)
    sum_t = sum_t * exp(max_t - new_t) + other_sum_t * exp(other_max_t - new_t)
    return new_s, sum_s, new_t, sum_t


@triton.jit
def _merge_parts2(max_s, sum_s, max_t, sum_t, other_max_s, other_sum_s, other_max_t, other_sum_t):
    """`_merge_parts` of base 2."""
    new_s, new_t = tl.maximum(max_s, other_max_s), tl.maximum(max_t, other_max_t)
    sum_s = sum_s * tl.exp2(max_s - new_s) + other_sum_s * tl.exp2(other_max_s - new_s)
    sum_t = sum_t * tl.exp2(max_t - new_t) + other_sum_t * tl.exp2(other_max_t - new_t)
    return new_s, sum_s, new_t, sum_t


@triton.jit
def _row_constants(slots, parts, MAX_PARTS: tl.constexpr, FAST: tl.constexpr):
    """(row_max, log2_sum) of both heads, from the statistics of all parts of the row."""
    b_max_s = _wait_for(slots, parts, LOG_ZERO, MAX_PARTS)
    b_sum_s = _wait_for(slots + MAX_PARTS, parts, 0.0, MAX_PARTS)
    b_max_t = _wait_for(slots + 2 * MAX_PARTS, parts, LOG_ZERO, MAX_PARTS)
    b_sum_t = _wait_for(slots + 3 * MAX_PARTS, parts, 0.0, MAX_PARTS)
    if _INTERPRETED:
        max_s, max_t = tl.max(b_max_s, 0), tl.max(b_max_t, 0)
        sum_s = tl.sum(b_sum_s * _power(b_max_s - max_s, FAST), 0)
        sum_t = tl.sum(b_sum_t * _power(b_max_t - max_t, FAST), 0)
    elif FAST:
        max_s, sum_s, max_t, sum_t = tl.reduce(
            (b_max_s, b_sum_s, b_max_t, b_sum_t), 0, _merge_parts2
        )
    else:
        max_s, sum_s, max_t, sum_t = tl.reduce(
            (b_max_s, b_sum_s, b_max_t, b_sum_t), 0, _merge_parts
        )
    return max_s, log2(sum_s), max_t, log2(sum_t)


# ------------------------------------------------------------------------------- the steps of a row


@triton.jit
def _part_statistics(b_z_s, b_z_t, ENTROPY: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr):
    """Statistics of a part, as triton_merge describes them but for the base.

    (row_max, sum_exp, sum_exp_logit) of the student, the same of the teacher, (cross, infinite).
    """
    max_s, max_t = block_max2(b_z_s, b_z_t)
    if FAST:
        max_s, max_t = max_s * LOG2_E, max_t * LOG2_E
    max_s, max_t = tl.maximum(max_s, LOG_ZERO), tl.maximum(max_t, LOG_ZERO)
    b_u_s, b_u_t = _shifted(b_z_s, max_s, FAST), _shifted(b_z_t, max_t, FAST)
    b_exp_s, b_exp_t = _power(b_u_s, FAST), _power(b_u_t, FAST)
    b_weighted_s = b_exp_s * tl.maximum(b_u_s, LOG_ZERO)
    b_weighted_t = b_exp_t * tl.maximum(b_u_t, LOG_ZERO)
    sum_exp_logit_s, sum_exp_logit_t, cross, gap = 0.0, 0.0, 0.0, 0.0
    if KIND == JSD:
        if ENTROPY:
            sum_exp_s, sum_exp_t, sum_exp_logit_s, sum_exp_logit_t = block_sum4(
                b_exp_s, b_exp_t, b_weighted_s, b_weighted_t
            )
        else:
            sum_exp_s, sum_exp_t = block_sum2(b_exp_s, b_exp_t)
    else:
        if KIND == FORWARD_KL:
            b_gap, shift, b_exp = b_z_t - b_z_s, max_t - max_s, b_exp_t
        else:
            b_gap, shift, b_exp = b_z_s - b_z_t, max_s - max_t, b_exp_s
        b_cross = b_exp * tl.clamp(_shifted(b_gap, shift, FAST), LOG_ZERO, -LOG_ZERO)
        if ENTROPY:
            sum_exp_s, sum_exp_t, sum_exp_logit_s, sum_exp_logit_t, cross, gap = block_sum5_max(
                b_exp_s, b_exp_t, b_weighted_s, b_weighted_t, b_cross, b_gap
            )
        else:
            sum_exp_s, sum_exp_t, cross, gap = block_sum3_max(b_exp_s, b_exp_t, b_cross, b_gap)
    infinite = tl.where(gap > -0.5 * LOG_ZERO, 1.0, 0.0)
    part_s, part_t = (max_s, sum_exp_s, sum_exp_logit_s), (max_t, sum_exp_t, sum_exp_logit_t)
    return part_s, part_t, (cross, infinite)


@triton.jit
def _in_base_e(part, FAST: tl.constexpr):
    """A head's (row_max, sum_exp, sum_exp_logit) as the statistics are stored."""
    return (part[0] * LN_2, part[1], part[2] * LN_2) if FAST else part


@triton.jit
def _terms(b_z_s, b_z_t, constants, beta, one_minus_beta, KIND: tl.constexpr, FAST: tl.constexpr):
    """(a, b, entry): what each column's gradient is made of, and its term of a JSD's value.

    a, b = s, t for the forward KL; s, log(t / s) for the reverse KL; (1 - beta) s, log(m / s) for
    the JSD.
    """
    max_s, log2_sum_s, max_t, log2_sum_t = constants
    if FAST:
        b_s = tl.exp2(_shifted(b_z_s, max_s, FAST) - log2_sum_s)
        b_t = tl.exp2(_shifted(b_z_t, max_t, FAST) - log2_sum_t)
        b_d = _shifted(b_z_t - b_z_s, max_t - max_s, FAST) - (log2_sum_t - log2_sum_s)
    else:
        b_s, b_t = probability(b_z_s, max_s, log2_sum_s), probability(b_z_t, max_t, log2_sum_t)
        b_d = log_ratio(b_z_t - b_z_s, max_s, log2_sum_s, max_t, log2_sum_t)
    if KIND == FORWARD_KL:
        terms = b_s, b_t, 0.0
    elif KIND == JSD:
        if FAST:
            # NaN if both are banned, which the clamp turns into a bound; s = t = 0 drop the term.
            b_d = tl.clamp(b_d, -_FAR, _FAR)
            b_q = log2_mixture(b_d, beta, one_minus_beta)
        else:
            b_d, b_q = jsd_terms(b_d, beta, one_minus_beta)
        b_s *= one_minus_beta
        terms = b_s, b_q, beta * b_t * (b_d - b_q) - b_s * b_q
    else:
        terms = b_s, tl.clamp(b_d, LOG_ZERO, -LOG_ZERO), 0.0
    return terms


@triton.jit
def _store_gradient(
    b_a, b_b,  # of `_terms`; for the forward KL the logits
    epilogue, slots, sums, scale, dz,
    i_n, i_part, parts, o_v, padded, dz_stride, sums_stride, beta, one_minus_beta,
    MAX_PARTS: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dz of this part of row i_n, and of a JSD the row's value and sum of shares."""
    factor = stored_grad_scale(dz, epilogue.inv_temp)
    if scale is not None:
        factor *= tl.load(scale + i_n)
    slots += i_n.to(tl.int64) * (_SLOTS * MAX_PARTS)
    if KIND == FORWARD_KL:
        constants = _row_constants(slots, parts, MAX_PARTS, FAST)
        b_s, b_t, _ = _terms(b_a, b_b, constants, beta, one_minus_beta, KIND, FAST)
        b_dz = (b_s - b_t) * softcap_slope(b_a, epilogue) * factor
    else:
        unit = LN_2 if FAST else 1.0
        b_shares = _wait_for(slots + 4 * MAX_PARTS, parts, 0.0, MAX_PARTS)
        if KIND == JSD:
            b_values = _wait_for(slots + 5 * MAX_PARTS, parts, 0.0, MAX_PARTS)
            sum_share, value = block_sum2(b_shares, b_values)
            sum_share /= one_minus_beta
            if i_part == 0:
                store_statistics(sums + i_n, sums_stride, (value * unit, sum_share * unit))
        else:
            sum_share = tl.sum(b_shares, 0)
            # An infinite reverse KL has no gradient (inf - inf): 0 here, the value reports it.
            factor = tl.where(sum_share == float("inf"), 0.0, factor)
            sum_share = tl.where(sum_share == float("inf"), 0.0, sum_share)
        b_dz = b_a * (sum_share - b_b) * (factor * unit)
    p_dz = dz + i_n.to(tl.int64) * dz_stride + o_v
    tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=o_v < padded)


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
    FAST: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, over raw_s."""
    stat_stride = rows.to(tl.int64) * splits
    i_part, teams = tl.program_id(0) % splits, tl.num_programs(0) // splits
    begin = i_part * BLOCK_V
    o_v = begin + tl.arange(0, BLOCK_V)
    i_before = tl.cast(-1, tl.int32)  # the row whose gradient is due: its terms are b_a and b_b
    b_a, b_b = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    for i_row in range(tl.program_id(0) // splits, rows, teams):
        i_n = tl.cast(i_row, tl.int32)
        o_row = i_n.to(tl.int64) * stride
        b_z_s, slope = row_logits(raw_s + o_row, o_v, cols, padded, epilogue_s)
        b_z_t, _ = row_logits(raw_t + o_row, o_v, cols, padded, epilogue_t)
        part_s, part_t, both = _part_statistics(b_z_s, b_z_t, ENTROPY, KIND, FAST)
        if out is not None:
            # The label's logits are stored before the others may write over them.
            end, y = begin + BLOCK_V, begin
            if label is not None:
                y = (tl.load(label + i_n) - vocab_start).to(tl.int32)
            label_s = load_label_logit(raw_s + o_row, y, begin, end, cols, epilogue_s)
            label_t = load_label_logit(raw_t + o_row, y, begin, end, cols, epilogue_t)
            p_out = out + i_part.to(tl.int64) * rows + i_n
            head_s, head_t = _in_base_e(part_s, FAST), _in_base_e(part_t, FAST)
            p_out = store_head(p_out, stat_stride, head_s, label_s, label, ENTROPY)
            p_out = store_head(p_out, stat_stride, head_t, label_t, label, ENTROPY)
            if KIND != JSD:
                cross, infinite = both
                store_statistics(p_out, stat_stride, (cross * LN_2 if FAST else cross, infinite))
        slots = exchange + i_n.to(tl.int64) * (_SLOTS * MAX_PARTS)
        p_own = slots + i_part
        _publish(p_own, (part_s[0], part_s[1], part_t[0], part_t[1]), MAX_PARTS)

        if i_before >= 0:
            _store_gradient(
                b_a, b_b, epilogue_s, exchange, sums, scale, dz, i_before, i_part, splits, o_v,
                padded, dz_stride, sums_stride, beta, one_minus_beta, MAX_PARTS, KIND, FAST,
            )  # fmt: skip
        if KIND == FORWARD_KL:
            b_a, b_b = b_z_s, b_z_t
        else:
            constants = _row_constants(slots, splits, MAX_PARTS, FAST)
            b_a, b_b, b_entry = _terms(b_z_s, b_z_t, constants, beta, one_minus_beta, KIND, FAST)
            if KIND == JSD:
                _publish(p_own + 4 * MAX_PARTS, block_sum2(b_a * b_b, b_entry), MAX_PARTS)
            else:
                sum_share = tl.where(both[1] > 0, float("inf"), tl.sum(b_a * b_b, 0))
                _publish(p_own + 4 * MAX_PARTS, (sum_share,), MAX_PARTS)
            b_a *= slope
        i_before = i_n
    _store_gradient(
        b_a, b_b, epilogue_s, exchange, sums, scale, dz, i_before, i_part, splits, o_v,
        padded, dz_stride, sums_stride, beta, one_minus_beta, MAX_PARTS, KIND, FAST,
    )  # fmt: skip
