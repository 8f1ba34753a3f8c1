"""Elementwise math of the Triton kernels: probabilities, terms of a divergence, gradients.

z is a logit after bias, softcap and temperature. A row is described by its maximum `row_max` and by
`log2_sum`, the base-2 logarithm of its sum of exp(z - row_max): exponentials are powers of 2, which
the hardware computes in one instruction. Arguments may have any shape; values of a row must
broadcast to the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# A finite stand-in for log 0: exp gives exactly 0, and differences of two of them do not overflow.
LOG_ZERO = tl.constexpr(-1e38)
# Between any logit and LOG_ZERO.
BANNED = tl.constexpr(-5e37)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# A gradient of z is stored in fp16 times this: the entries of a close pair would fall below the
# smallest number; a reverse KL's stay finite where log-probabilities are up to 4,000 apart.
FP16_BOOST = tl.constexpr(64.0)
FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# exp(80) is finite, and 1 + exp(80) == exp(80).
_FAR = tl.constexpr(80.0)
# The interpreter has no device functions, and its tests check the math, not the hardware's exp2.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp(x):
    """exp(x) by ex2.approx, 0 of -inf. Relative error 2^-22, plus abs(x) 2^-24 of x * log2(e)."""
    if _INTERPRETED:
        y = tl.exp(x)
    else:
        y = tl.exp2(x * LOG2_E)
    return y


@triton.jit
def _fast_divide(a, b):
    """a / b by one reciprocal, within 2 ulp."""
    if _INTERPRETED:
        y = a / b
    else:
        y = libdevice.fast_dividef(a, b)
    return y


@triton.jit
def log2(x):
    """log2(x) by lg2.approx, whose absolute error is 2^-22 between 0.5 and 2."""
    if _INTERPRETED:
        y = tl.log2(x)
    else:
        y = libdevice.fast_log2f(x)
    return y


@triton.jit
def sum_columns(b_x):
    """(BLOCK_N,) row sums of (BLOCK_N, columns): the same bits in all threads that have the row.

    Where a thread has one column of a row (fused tiles of 64 rows), the compiler would fuse the
    multiplication that made it with the first addition across threads: fma(a, b, c d) in one thread
    and fma(c, d, a b) in the other differ in the last bit. add_rn is never fused.
    """
    if not _INTERPRETED and b_x.shape[0] < 128:
        b_x = libdevice.add_rn(b_x, 0.0)
    return tl.sum(b_x, 1)


@triton.jit
def stored_grad_scale(dz, inv_temp):
    """Factor from a gradient of z to what is stored at `dz`, the gradient of the raw logits.

    In fp16 it is FP16_BOOST; the caller then applies 1 / temperature and removes the boost in fp32.
    """
    scale = inv_temp
    if dz.dtype.element_ty == tl.float16:
        scale = FP16_BOOST
    return scale


# ---------------------------------------------------------------------------------- from raw logits


class Epilogue(NamedTuple):
    """What turns a raw logit into z = softcap(raw + bias) * inv_temp, as one kernel argument."""

    bias: Tensor | None  # (V,)
    softcap: float | None
    inv_temp: float  # 1 / temperature


@triton.jit
def apply_softcap(raw, softcap):
    """(softcap * tanh(raw / softcap), its derivative).

    tanh(abs(x)) comes from exp(-2 abs(x)): its error is absolute, like the error of the logits.
    """
    small = exp(-2.0 * tl.abs(raw * (1.0 / softcap)))
    tanh = (1.0 - small) / (1.0 + small)
    return softcap * tl.where(raw < 0, -tanh, tanh), 1.0 - tanh * tanh


@triton.jit
def softcap_slope(z, epilogue):
    """The derivative of `apply_softcap` from its result over temperature; 1 without a softcap."""
    slope = 1.0
    if epilogue.softcap is not None:
        tanh = z * (1.0 / (epilogue.softcap * epilogue.inv_temp))
        slope = tl.maximum(1.0 - tanh * tanh, 0.0)  # 0 beyond the vocabulary, where z is -inf
    return slope


@triton.jit
def load_class_weights(class_weight, o_v, cols):
    """Class weights of the columns `o_v`: 1 if class_weight is None, 0 beyond the vocabulary."""
    if class_weight is None:
        weight = tl.where(o_v < cols, 1.0, 0.0)
    else:
        weight = tl.load(class_weight + o_v, mask=o_v < cols, other=0.0)
    return weight


@triton.jit
def load_rates(rates, o_n, rows):
    """(sharp, mass) of the rows `o_n`, see `logprob_terms`; both 1 if `rates` (2, rows) is None."""
    if rates is None:
        sharp, mass = 1.0, 1.0
    else:
        sharp, mass = tl.load(rates + o_n), tl.load(rates + rows.to(tl.int64) + o_n)
    return sharp, mass


@triton.jit
def probability(z, row_max, log2_sum):
    """softmax(z) = exp(z - row_max) / sum_exp."""
    if _INTERPRETED:
        p = tl.exp((z - row_max) - log2_sum * LN_2)
    else:
        p = tl.exp2((z - row_max) * LOG2_E - log2_sum)
    return p


@triton.jit
def rescale_sum(total, shift, sum_exp, other_shift=0.0):
    """sum exp(u) (u - v) relative to new maxima, from `total` relative to the old ones.

    The old maximum of u lies `shift` from the new one, that of v `other_shift`; sum_exp is
    sum exp(u) relative to the old maximum. 0, not 0 * inf, where exp(shift) is 0.
    """
    shrink = exp(shift)
    return tl.where(shrink > 0, (total + (shift - other_shift) * sum_exp) * shrink, 0.0)


# ---------------------------------------------------------------------------------- the divergences


@triton.jit
def log_ratio(gap, row_max_s, log2_sum_s, row_max_t, log2_sum_t):
    """d = log(t / s) from gap = z_t - z_s: the logits of a close pair cancel before rounding."""
    return (gap - (row_max_t - row_max_s)) - (log2_sum_t - log2_sum_s) * LN_2


@triton.jit
def log_mixture(d, beta, one_minus_beta):
    """log(m / s) = log(1 - beta + beta exp(d)) for m = (1 - beta) s + beta t and d = log(t / s).

    Three branches, with x = beta expm1(d) = m / s - 1:
    abs(d) < 0.35: Taylor series. Its coefficients are the cumulants of a coin of probability beta
        over n!; it converges for abs(d) < pi at least, and on close pairs the rounding of log s
        and log t cancels to first order.
    1/2 < m / s < 2: 2 artanh(x / (2 + x)). There lg2.approx has only an absolute error.
    else: lg2.approx(1 + x).
    """
    v, skew = beta * one_minus_beta, 1.0 - 2.0 * beta
    c2, c3, c4 = v / 2, v * skew / 6, v * (1 - 6 * v) / 24
    c5 = v * skew * (1 - 12 * v) / 120
    c6 = v * (1 + v * (-30 + 120 * v)) / 720
    c7 = v * skew * (1 + v * (-60 + 360 * v)) / 5040
    c8 = v * (1 + v * (-126 + v * (1680 - 5040 * v))) / 40320
    near = d * (beta + d * (c2 + d * (c3 + d * (c4 + d * (c5 + d * (c6 + d * (c7 + d * c8)))))))
    x = beta * exp(d) - beta
    y = _fast_divide(x, 2.0 + x)
    yy = y * y
    middle = 2 * y * (1 + yy * (1 / 3 + yy * (1 / 5 + yy * (1 / 7 + yy * (1 / 9 + yy / 11)))))
    far = tl.where(tl.abs(x - 0.25) < 0.75, middle, log2(1.0 + x) * LN_2)
    return tl.where(tl.abs(d) < 0.35, near, far)


@triton.jit
def log2_mixture(d, beta, one_minus_beta):
    """log2(m / s) from d = log2(t / s), for 16-bit gradients and a beta from 0.1 to 0.9.

    Fewer instructions than `log_mixture`: its series in base 2 where abs(log(t / s)) < 0.5, else
    lg2.approx, whose absolute error is then at most 1e-5 of the result.
    """
    v, skew = beta * one_minus_beta, 1.0 - 2.0 * beta
    c2, c3 = v / 2 * LN_2, v * skew / 6 * (LN_2 * LN_2)
    c4 = v * (1 - 6 * v) / 24 * (LN_2 * LN_2 * LN_2)
    c5 = v * skew * (1 - 12 * v) / 120 * (LN_2 * LN_2 * LN_2 * LN_2)
    c6 = v * (1 + v * (-30 + 120 * v)) / 720 * (LN_2 * LN_2 * LN_2 * LN_2 * LN_2)
    c7 = v * skew * (1 + v * (-60 + 360 * v)) / 5040 * (LN_2 * LN_2 * LN_2 * LN_2 * LN_2 * LN_2)
    near = d * (beta + d * (c2 + d * (c3 + d * (c4 + d * (c5 + d * (c6 + d * c7))))))
    far = log2(tl.fma(tl.exp2(d), beta, one_minus_beta))
    return tl.where(tl.abs(d) < 0.5 * LOG2_E, near, far)


@triton.jit
def jsd_terms(d, beta, one_minus_beta):
    """(d, q): d clamped to where exp(d) is finite, and q = log(m / s); s q is the row's share."""
    # If both are banned d is NaN, which the clamp turns into a bound; s = t = 0 then drop the term.
    d = tl.clamp(d, -_FAR, _FAR)
    return d, log_mixture(d, beta, one_minus_beta)


@triton.jit
def divergence_terms(s, t, d, beta, one_minus_beta, KIND: tl.constexpr):
    """(entry, share): a column's term of the value, and the term its gradient is made of.

    share is t for the forward KL, entry + s for the reverse KL, s log(m / s) for the JSD.
    """
    if KIND == JSD:
        d, q = jsd_terms(d, beta, one_minus_beta)
        share = s * q
        entry = beta * t * (d - q) - one_minus_beta * share
    else:
        # The clamp makes 0 log 0 = 0; an infinite KL is reported by the statistics.
        d = tl.clamp(d, LOG_ZERO, -LOG_ZERO)
        if KIND == FORWARD_KL:
            entry = t * d
            share = t
        else:
            entry = -s * d
            share = entry + s
    return entry, share


@triton.jit
def divergence_grad(s, t, d, sum_share, clip, beta, one_minus_beta, KIND: tl.constexpr):
    """d value / d z of the student, for one column.

    sum_share is the row's sum of shares. Without a clip it is 1 for the forward KL and the value
    itself for the reverse KL.
    """
    if clip is None:
        if KIND == FORWARD_KL:
            grad = s - t
        elif KIND == REVERSE_KL:
            grad = -s * (tl.clamp(d, LOG_ZERO, -LOG_ZERO) + sum_share)
        else:
            d, q = jsd_terms(d, beta, one_minus_beta)
            grad = one_minus_beta * s * (sum_share - q)
    else:
        entry, share = divergence_terms(s, t, d, beta, one_minus_beta, KIND)
        share = tl.where(entry > clip, 0.0, share)
        if KIND == JSD:
            grad = one_minus_beta * (s * sum_share - share)
        elif KIND == FORWARD_KL:
            grad = s * sum_share - share
        else:
            grad = share - s * sum_share
    return grad
