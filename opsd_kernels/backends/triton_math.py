"""Row arithmetic of the Triton kernels, one logit at a time: probabilities, entries, slopes.

z is a logit after bias, softcap and temperature. A row is known by its maximum `top` and by
`log2_total`, the base-2 logarithm of its sum of exp(z - top): exponentials are powers of 2, which
the hardware computes in one instruction. Tiles have any shape; what is known of their rows must
broadcast to it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# A finite stand-in for log 0: exp gives exactly 0, and differences of two of them do not overflow.
LOG_ZERO = tl.constexpr(-1e38)
# Between any logit and LOG_ZERO.
BANNED = tl.constexpr(-5e37)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# A gradient of z is kept in fp16 times this: a close pair's entries would fall below the smallest
# number; a reverse KL's stay finite where log-probabilities are up to 4,000 apart.
FP16_BOOST = tl.constexpr(64.0)
FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# exp(80) is finite, and beside it 1 is nothing.
_FAR = tl.constexpr(80.0)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp(x):
    """exp(x) by ex2.approx, 0 of -inf: relative error 2^-22, and abs(x) 2^-24 for the way there."""
    if _INTERPRETED:  # the tests' tolerances are for the arithmetic, not for the way to base 2
        y = tl.exp(x)
    else:
        y = tl.exp2(x * LOG2_E)
    return y


@triton.jit
def _ratio(a, b):
    """a / b by one reciprocal, within 2 ulp."""
    if _INTERPRETED:  # which knows no device functions
        y = a / b
    else:
        y = libdevice.fast_dividef(a, b)
    return y


@triton.jit
def log2(x):
    """log2(x) by lg2.approx, whose absolute error is 2^-22 between 0.5 and 2."""
    if _INTERPRETED:  # which knows no device functions
        y = tl.log2(x)
    else:
        y = libdevice.fast_log2f(x)
    return y


@triton.jit
def gradient_unit(dz, inv_temp):
    """Factor between a gradient of z and what is stored at `dz` for one of raw logits.

    Of fp16 the launcher applies the temperature, and takes back the boost, in fp32.
    """
    unit = inv_temp
    if dz.dtype.element_ty == tl.float16:
        unit = FP16_BOOST
    return unit


# ---------------------------------------------------------------------------------- from raw logits


@triton.jit
def capped(raw, softcap):
    """(softcap tanh(raw / softcap), its slope). tanh of abs(x) by exp(-2 abs(x)): its error is
    absolute, as that of the logits is."""
    small = exp(-2.0 * tl.abs(raw * (1.0 / softcap)))
    height = (1.0 - small) / (1.0 + small)
    return softcap * tl.where(raw < 0, -height, height), 1.0 - height * height


@triton.jit
def class_weights(w, c, cols):
    """Weights of the columns c, 1 where there are none, 0 beyond the vocabulary."""
    if w is None:
        found = tl.where(c < cols, 1.0, 0.0)
    else:
        found = tl.load(w + c, mask=c < cols, other=0.0)
    return found


@triton.jit
def rates_of(rates, at, rows):
    """(sharp, mass) of rows `at`, see `logprob_terms`; without `rates` both are 1."""
    if rates is None:
        sharp, mass = 1.0, 1.0
    else:
        sharp, mass = tl.load(rates + at), tl.load(rates + rows.to(tl.int64) + at)
    return sharp, mass


@triton.jit
def probability(z, top, log2_total):
    if _INTERPRETED:
        p = tl.exp((z - top) - log2_total * LN_2)
    else:
        p = tl.exp2((z - top) * LOG2_E - log2_total)
    return p


@triton.jit
def rescaled(total, shift, weight, other=0.0):
    """sum p (u - v) under new maxima, `shift` and `other` below which the old ones of u and v lie.

    Where nothing is left of p, 0 and not 0 * inf.
    """
    shrink = exp(shift)
    return tl.where(shrink > 0, (total + (shift - other) * weight) * shrink, 0.0)


# ---------------------------------------------------------------------------------- the divergences


@triton.jit
def log_ratio(z_s, z_t, top_s, log2_s, top_t, log2_t):
    """d = log(t / s), from z_t - z_s: the logits of a close pair cancel before they are rounded."""
    return ((z_t - z_s) - (top_t - top_s)) - (log2_t - log2_s) * LN_2


@triton.jit
def log_mixture(d, beta, rest):
    """log(rest + beta exp(d)), rest = 1 - beta: log(m / s) from d = log(t / s).

    Near 0 by its Taylor series, whose coefficients are the cumulants of a coin of probability beta
    over n!: it converges for abs(d) < pi at least, and on close pairs the rounding of log s and
    log t cancels to first order. Beyond, with x = beta expm1(d), by 2 artanh(x / (2 + x)) while
    m / s is between 1/2 and 2, where lg2.approx has an absolute error only, else by lg2.approx.
    """
    v, skew = beta * rest, 1.0 - 2.0 * beta
    c2, c3, c4 = v / 2, v * skew / 6, v * (1 - 6 * v) / 24
    c5 = v * skew * (1 - 12 * v) / 120
    c6 = v * (1 + v * (-30 + 120 * v)) / 720
    c7 = v * skew * (1 + v * (-60 + 360 * v)) / 5040
    c8 = v * (1 + v * (-126 + v * (1680 - 5040 * v))) / 40320
    near = d * (beta + d * (c2 + d * (c3 + d * (c4 + d * (c5 + d * (c6 + d * (c7 + d * c8)))))))
    x = beta * exp(d) - beta
    y = _ratio(x, 2.0 + x)
    yy = y * y
    middle = 2 * y * (1 + yy * (1 / 3 + yy * (1 / 5 + yy * (1 / 7 + yy * (1 / 9 + yy / 11)))))
    far = tl.where(tl.abs(x - 0.25) < 0.75, middle, log2(1.0 + x) * LN_2)
    return tl.where(tl.abs(d) < 0.35, near, far)


@triton.jit
def jsd_terms(d, beta, rest):
    """(d, q = log(m / s)) with d where neither overflows; q times s is the row's share."""
    # Both banned give a NaN, which becomes a bound here: s = t = 0 make nothing of it.
    d = tl.clamp(d, -_FAR, _FAR)
    return d, log_mixture(d, beta, rest)


@triton.jit
def entries(s, t, d, beta, rest, KIND: tl.constexpr):
    """(entry, share): each column's part of the value, and what its gradient is made of.

    share is t for the forward KL, entry + s for the reverse KL, s log(m/s) for the JSD.
    """
    if KIND == JSD:
        d, q = jsd_terms(d, beta, rest)
        share = s * q
        entry = beta * t * (d - q) - rest * share
    else:
        # 0 log 0 = 0, and an infinite KL is reported by its statistics.
        d = tl.clamp(d, LOG_ZERO, -LOG_ZERO)
        if KIND == FORWARD_KL:
            entry = t * d
            share = t
        else:
            entry = -s * d
            share = entry + s
    return entry, share


@triton.jit
def divergence_slope(s, t, d, total, clip, beta, rest, KIND: tl.constexpr):
    """Derivative of the value with respect to the student's logits.

    total is the row's sum of shares: 1 for the forward KL and the value itself for the reverse KL
    without a clip.
    """
    if clip is None:
        if KIND == FORWARD_KL:
            slope = s - t
        elif KIND == REVERSE_KL:
            slope = -s * (tl.clamp(d, LOG_ZERO, -LOG_ZERO) + total)
        else:
            d, q = jsd_terms(d, beta, rest)
            slope = rest * s * (total - q)
    else:
        entry, share = entries(s, t, d, beta, rest, KIND)
        share = tl.where(entry > clip, 0.0, share)
        if KIND == JSD:
            slope = rest * (s * total - share)
        elif KIND == FORWARD_KL:
            slope = s * total - share
        else:
            slope = share - s * total
    return slope
