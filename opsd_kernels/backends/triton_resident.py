"""Statistics, sums and gradient of a pair's rows in one pass over their logits.

A row's programs each hold a part of it in registers, tell each other their statistics and then
their sums, and write the gradient over the logits, which nobody needs any more: who has told its
statistics has read its logits. Programs form teams, which take rows in turn. All run at once, and
each fetches its part of the next row while it works on one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_math import (
    FORWARD_KL,
    JSD,
    LOG_ZERO,
    divergence_slope,
    entries,
    exp,
    gradient_unit,
    log2,
    log_ratio,
    probability,
)
from opsd_kernels.backends.triton_rows import ROW_NUMBERS, label_logit, row_logits, store_head

# What stands on the board until it is written: a NaN that no arithmetic gives.
UNTOLD = 0x7FA5A5A5
_UNTOLD = tl.constexpr(UNTOLD)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TOLD = 5  # numbers that a part tells the others of its row
_TOLD = tl.constexpr(TOLD)


@triton.jit
def _larger(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _added(a, b, c, d):
    return a + c, b + d


@triton.jit
def _added4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _joined(top_s, total_s, top_t, total_t, other_s, more_s, other_t, more_t):
    """Maxima and sums of exponentials of two parts, of both heads."""
    now_s, now_t = tl.maximum(top_s, other_s), tl.maximum(top_t, other_t)
    total_s = total_s * exp(top_s - now_s) + more_s * exp(other_s - now_s)
    total_t = total_t * exp(top_t - now_t) + more_t * exp(other_t - now_t)
    return now_s, total_s, now_t, total_t


# Several at once: the threads of a program meet once. The interpreter takes each element of such a
# reduction in turn, and one of its own all together.


@triton.jit
def _maxima(a, b):
    if _INTERPRETED:
        found = tl.max(a, 0), tl.max(b, 0)
    else:
        found = tl.reduce((a, b), 0, _larger)
    return found


@triton.jit
def _sums(a, b):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0)
    else:
        found = tl.reduce((a, b), 0, _added)
    return found


@triton.jit
def _sums4(a, b, c, d):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
    else:
        found = tl.reduce((a, b, c, d), 0, _added4)
    return found


@triton.jit
def _fetch(z, begin, padded, COUNT: tl.constexpr):
    """Bring so many logits of a row into L2."""
    if not _INTERPRETED:
        # A line is 128 bytes. The result is not used.
        at = tl.minimum(begin + tl.arange(0, COUNT // 32) * 32, padded - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [z + at], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _tell(at, value):
    tl.store(at, value.to(tl.int32, bitcast=True))


@triton.jit
def _read(at, there):
    return tl.load(at, mask=there, other=0, volatile=True)


@triton.jit
def _any(these):
    return tl.max(these.to(tl.int32), 0) > 0


@triton.jit
def _heard(bits, there, other):
    return tl.where(there, bits.to(tl.float32, bitcast=True), other)


@triton.jit
def _row_of_all(board, parts, ROOM: tl.constexpr):
    """(maximum, log2 of the sum) of both heads, when every part of the row has told its own."""
    at = board + tl.arange(0, ROOM)
    there = tl.arange(0, ROOM) < parts
    a, b = _read(at, there), _read(at + ROOM, there)
    c, d = _read(at + 2 * ROOM, there), _read(at + 3 * ROOM, there)
    while _any((a == _UNTOLD) | (b == _UNTOLD) | (c == _UNTOLD) | (d == _UNTOLD)):
        a, b = _read(at, there), _read(at + ROOM, there)
        c, d = _read(at + 2 * ROOM, there), _read(at + 3 * ROOM, there)
    tops_s, totals_s = _heard(a, there, LOG_ZERO), _heard(b, there, 0.0)
    tops_t, totals_t = _heard(c, there, LOG_ZERO), _heard(d, there, 0.0)
    if _INTERPRETED:
        top_s, top_t = tl.max(tops_s, 0), tl.max(tops_t, 0)
        total_s = tl.sum(totals_s * exp(tops_s - top_s), 0)
        total_t = tl.sum(totals_t * exp(tops_t - top_t), 0)
    else:
        top_s, total_s, top_t, total_t = tl.reduce((tops_s, totals_s, tops_t, totals_t), 0, _joined)
    return top_s, log2(total_s), top_t, log2(total_t)


@triton.jit
def _sum_of_all(board, parts, ROOM: tl.constexpr):
    """The sum of what every part has told."""
    at = board + tl.arange(0, ROOM)
    there = tl.arange(0, ROOM) < parts
    a = _read(at, there)
    while _any(a == _UNTOLD):
        a = _read(at, there)
    return tl.sum(_heard(a, there, 0.0), 0)


@triton.jit(**ROW_NUMBERS)
def resident_divergence(
    z_s, z_t, bias_s, cap_s, inv_temp_s, bias_t, cap_t, inv_temp_t, label, out, sums, board, scale,
    dz, rows, cols, padded, stride, dz_stride, first, beta, rest, splits,
    BLOCK_V: tl.constexpr, ROOM: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """d value / d raw logits of the student, times the row's scale, over z_s.

    A row has `splits` parts. out and sums get each part's statistics and sums, as
    `row_statistics_pair` and `row_divergence_sums` give them. The board (rows, TOLD, ROOM) is all
    UNTOLD.
    """
    jump = rows.to(tl.int64) * splits
    part, teams = tl.program_id(0) % splits, tl.num_programs(0) // splits
    begin = part * BLOCK_V
    for number in range(tl.program_id(0) // splits, rows, teams):
        row = tl.cast(number, tl.int32)
        at_row = row.to(tl.int64) * stride
        at_next = tl.minimum(row + teams, rows - 1).to(tl.int64) * stride
        _fetch(z_s + at_next, begin, padded, BLOCK_V)
        _fetch(z_t + at_next, begin, padded, BLOCK_V)
        c = begin + tl.arange(0, BLOCK_V)
        x_s, slope = row_logits(z_s + at_row, c, cols, padded, bias_s, cap_s, inv_temp_s)
        x_t, _ = row_logits(z_t + at_row, c, cols, padded, bias_t, cap_t, inv_temp_t)
        end, y = begin + BLOCK_V, begin
        if label is not None:
            y = (tl.load(label + row) - first).to(tl.int32)
        label_s = label_logit(z_s + at_row, y, begin, end, cols, bias_s, cap_s, inv_temp_s)
        label_t = label_logit(z_t + at_row, y, begin, end, cols, bias_t, cap_t, inv_temp_t)
        top_s, top_t = _maxima(x_s, x_t)
        top_s, top_t = tl.maximum(top_s, LOG_ZERO), tl.maximum(top_t, LOG_ZERO)
        u_s, u_t = x_s - top_s, x_t - top_t
        s, t = exp(u_s), exp(u_t)
        weighted_s, weighted_t = 0.0, 0.0
        if ENTROPY:
            total_s, total_t, weighted_s, weighted_t = _sums4(
                s, t, s * tl.maximum(u_s, LOG_ZERO), t * tl.maximum(u_t, LOG_ZERO)
            )
        else:
            total_s, total_t = _sums(s, t)
        lost, cross = 0.0, 0.0
        if KIND != JSD:
            if KIND == FORWARD_KL:
                d = x_t - x_s
                cross = t * (tl.clamp(d, LOG_ZERO, -LOG_ZERO) - (top_t - top_s))
            else:
                d = x_s - x_t
                cross = s * (tl.clamp(d, LOG_ZERO, -LOG_ZERO) - (top_s - top_t))
            cross = tl.sum(cross, 0)
            lost = tl.where(tl.max(d, 0) > -0.5 * LOG_ZERO, 1.0, 0.0)
        at = out + part.to(tl.int64) * rows + row
        at = store_head(at, jump, top_s, total_s, weighted_s, label_s, label, ENTROPY)
        at = store_head(at, jump, top_t, total_t, weighted_t, label_t, label, ENTROPY)
        if KIND != JSD:
            tl.store(at, cross)
            tl.store(at + jump, lost)
        # From here on the others may write over this part: what it read has arrived and is stored.
        tl.debug_barrier()
        told = board + row.to(tl.int64) * (_TOLD * ROOM)
        mine = told + part
        _tell(mine, top_s)
        _tell(mine + ROOM, total_s)
        _tell(mine + 2 * ROOM, top_t)
        _tell(mine + 3 * ROOM, total_t)
        top_s, log2_s, top_t, log2_t = _row_of_all(told, splits, ROOM)
        s, t = probability(x_s, top_s, log2_s), probability(x_t, top_t, log2_t)
        d = log_ratio(x_s, x_t, top_s, log2_s, top_t, log2_t)
        factor = gradient_unit(dz, inv_temp_s)
        if scale is not None:
            factor *= tl.load(scale + row)
        if KIND == FORWARD_KL:
            grad = s - t
        else:
            entry, share = entries(s, t, d, beta, rest, KIND)
            value, mean = _sums(entry, share)
            if KIND == JSD:
                _tell(mine + 4 * ROOM, mean)
                at = sums + part.to(tl.int64) * rows + row
                tl.store(at, value)
                tl.store(at + jump, mean)
                grad = rest * (s * _sum_of_all(told + 4 * ROOM, splits, ROOM) - share)
            else:
                _tell(mine + 4 * ROOM, tl.where(lost > 0, float("inf"), value))
                total = _sum_of_all(told + 4 * ROOM, splits, ROOM)
                # Of an infinite reverse KL inf - inf has no direction; the value reports it.
                factor = tl.where(total == float("inf"), 0.0, factor)
                total = tl.where(total == float("inf"), 0.0, total)
                grad = divergence_slope(s, t, d, total, None, beta, rest, KIND)
        grad = (grad * slope * factor).to(dz.dtype.element_ty)
        tl.store(dz + row.to(tl.int64) * dz_stride + c, grad, mask=c < padded)
