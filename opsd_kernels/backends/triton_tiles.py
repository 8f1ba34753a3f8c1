"""Tiles of logits in Triton: where they come from, and the row arithmetic both schedules share.

A tile is (R, C) fp32: R rows by C vocabulary columns. It is read from a block of logits in memory,
or multiplied from hidden states and head on the spot. A row's columns are folded into running
statistics relative to the running maximum, so that tiles, programs and ranks merge alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A finite stand-in for log 0: exp gives exactly 0, and differences of two of them do not overflow.
LOG_ZERO = tl.constexpr(-1e38)
# Between any logit and LOG_ZERO.
BANNED = tl.constexpr(-5e37)
FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# ---------------------------------------------------------------------------- where tiles come from


@triton.jit
def operand(
    x, row, k, rows, depth, row_stride, k_stride,
    R: tl.constexpr, K: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(R, K) operand of a product, zero beyond `depth`; rows past the end hold anything finite."""
    if DESCRIBED:
        tile = x.load([row, k])
    else:
        # The last row again instead of a mask: their products are dropped with the tile's edge.
        r = tl.minimum(row + tl.arange(0, R), rows - 1).to(tl.int64)
        c = k + tl.arange(0, K)
        at = x + r[:, None] * row_stride + c[None, :].to(tl.int64) * k_stride
        if EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=c[None, :] < depth, other=0.0)
    return tile


@triton.jit
def product(
    h, w, row, col, rows, cols, depth, h_row, h_k, w_row, w_k,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, C) tile of h @ w.T in fp32."""
    acc = tl.zeros((R, C), tl.float32)
    for k in range(0, depth, K):
        a = operand(h, row, k, rows, depth, h_row, h_k, R, K, DESCRIBED, EVEN)
        b = operand(w, col, k, cols, depth, w_row, w_k, C, K, DESCRIBED, EVEN)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def shared_products(
    h_s, h_t, w, row, col, rows, cols, depth, s_row, s_k, t_row, t_k, w_row, w_k,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Student's and teacher's tile of one head: each weight tile is loaded once for both."""
    student = tl.zeros((R, C), tl.float32)
    teacher = tl.zeros((R, C), tl.float32)
    for k in range(0, depth, K):
        b = tl.trans(operand(w, col, k, cols, depth, w_row, w_k, C, K, DESCRIBED, EVEN))
        a = operand(h_s, row, k, rows, depth, s_row, s_k, R, K, DESCRIBED, EVEN)
        student = tl.dot(a, b, student, input_precision=PRECISION)
        a = operand(h_t, row, k, rows, depth, t_row, t_k, R, K, DESCRIBED, EVEN)
        teacher = tl.dot(a, b, teacher, input_precision=PRECISION)
    return student, teacher


@triton.jit
def stored(z, row, col, rows, cols, row_stride, R: tl.constexpr, C: tl.constexpr):
    """(R, C) tile of logits that a GEMM left in memory."""
    r = tl.minimum(row + tl.arange(0, R), rows - 1).to(tl.int64)
    c = col + tl.arange(0, C)
    at = z + r[:, None] * row_stride + c[None, :]
    return tl.load(at, mask=(c < cols)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _half(tile, right: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    first, second = tl.split(tl.permute(tl.reshape(tile, (R, 2, C // 2)), (0, 2, 1)))
    if right:
        first = second
    return first


@triton.jit
def part_of(tile, part: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """(R, C / PARTS) of a tile in 1, 2, 4 or 8 parts, whose row arithmetic fits in registers."""
    if PARTS == 1:
        piece = tile
    elif PARTS == 2:
        piece = _half(tile, part, R, C)
    elif PARTS == 4:
        piece = _half(_half(tile, part // 2, R, C), part % 2, R, C // 2)
    else:
        quarter = _half(_half(tile, part // 4, R, C), part // 2 % 2, R, C // 2)
        piece = _half(quarter, part % 2, R, C // 4)
    return piece


@triton.jit
def finished(raw, col, cols, bias, softcap, temperature, C: tl.constexpr):
    """(z, slope): z = softcap(raw + bias) / temperature, and d softcap / d raw.

    Columns past the end and banned entries become LOG_ZERO.
    """
    c = col + tl.arange(0, C)
    slope = 1.0
    if bias is not None:
        raw += tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        # tanh of |x| by exp(-2 |x|): its error is absolute, as that of the logits is.
        small = tl.exp(-2.0 * tl.abs(raw / softcap))
        height = (1.0 - small) / (1.0 + small)
        slope = 1.0 - height * height
        raw = softcap * tl.where(raw < 0, -height, height)
    # A comparison lets NaN through, where a maximum would hide it.
    z = raw / temperature
    z = tl.where(z < LOG_ZERO, LOG_ZERO, z)
    return tl.where((c < cols)[None, :], z, LOG_ZERO), slope


# ---------------------------------------------------------------------------- statistics of a row


@triton.jit
def risen(z, top):
    """The running maximum after a tile, and how far the old one now lies below it."""
    now = tl.maximum(top, tl.max(z, 1))
    return now, top - now


@triton.jit
def rescaled(total, shift, weight, other=0.0):
    """sum p (u - v) under new maxima, `shift` and `other` below which the old ones of u and v lie.

    Where nothing is left of p, 0 and not 0 * inf.
    """
    shrink = tl.exp(shift)
    return tl.where(shrink > 0, (total + (shift - other) * weight) * shrink, 0.0)


@triton.jit
def crossed(z_p, z_q):
    """Per row, 1 where p is possible and q banned: there the KL of p from q is infinite."""
    return tl.max(tl.where((z_p > BANNED) & (z_q < BANNED), 1.0, 0.0), 1)


@triton.jit
def log_prob(z, top, total):
    """(R, C) log-probabilities and probabilities of rows with that maximum and sum."""
    log_p = (z - top[:, None]) - tl.log(total)[:, None]
    return log_p, tl.exp(log_p)


# ------------------------------------------------------------------------------- the divergences


@triton.jit
def log_mixture(d, beta, rest):
    """log(rest + beta exp(d)), rest = 1 - beta: log(m / s) from d = log(t / s).

    Near 0 by series for expm1 and log1p, so that on close pairs the rounding of log s and log t
    cancels to first order.
    """
    e = d * (1 + d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7))))))
    x = beta * e
    y = x / (2 + x)
    yy = y * y
    near = 2 * y * (1 + yy * (1 / 3 + yy * (1 / 5 + yy * (1 / 7 + yy / 9))))
    return tl.where(tl.abs(d) < 0.35, near, tl.log(rest + beta * tl.exp(d)))


@triton.jit
def entries(log_s, s, log_t, t, beta, rest, KIND: tl.constexpr):
    """(entry, share): each column's part of the value, and what its gradient is made of.

    share is t for the forward KL, entry + s for the reverse KL clipped, s log(m/s) for the JSD.
    """
    if KIND == FORWARD_KL:
        entry = t * (log_t - log_s)
        share = t
    elif KIND == REVERSE_KL:
        entry = s * (log_s - log_t)
        share = entry + s
    else:
        # Beyond 80 the smaller probability is nothing beside the larger, and exp is still finite.
        d = log_t - log_s
        d = tl.where(d > 80.0, 80.0, tl.where(d < -80.0, -80.0, d))
        q = log_mixture(d, beta, rest)
        share = s * q
        entry = beta * t * (d - q) - rest * share
    return entry, share


@triton.jit
def divergence_slope(entry, share, s, total, clip, rest, KIND: tl.constexpr):
    """(R, C) derivative of the value with respect to the student's logits.

    total is the row's sum of shares: 1 for the forward KL, the value itself for the reverse KL
    without a clip.
    """
    if clip is not None:
        share = tl.where(entry > clip, 0.0, share)
    elif KIND == REVERSE_KL:
        share = entry
    if KIND == FORWARD_KL:
        if clip is None:
            slope = s - share
        else:
            slope = s * total[:, None] - share
    else:
        slope = share - s * total[:, None]
        if KIND != REVERSE_KL:
            slope = -rest * slope
    return slope
