"""Statistics of spans of the vocabulary, of slices or of ranks, into those of the whole.

They stand in the order that triton_kernels.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opsd_kernels.backends.triton_kernels import HOW
from opsd_kernels.backends.triton_math import FORWARD_KL, JSD, LOG_ZERO, exp, rescaled


@triton.jit(**HOW)
def merge(
    parts, out, rows, width, count, part_width, R: tl.constexpr, SPANS: tl.constexpr,
    HEADS: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, LABEL: tl.constexpr,
    PREDICTED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Statistics of `count` spans, or of as many ranks, into those of the whole."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    inside = r < rows
    at = parts + tl.minimum(r, rows - 1)[None, :]
    each = part_width.to(tl.int64)
    stride = each * count
    at_t = at
    for head in tl.static_range(HEADS):
        top = tl.full((R,), LOG_ZERO, tl.float32)
        for i in range(0, count, SPANS):
            span, there = _spans_at(i, count, each, SPANS)
            top = tl.maximum(top, tl.max(tl.load(at + span, there, LOG_ZERO), 0))
        total = tl.zeros((R,), tl.float32)
        weighted = tl.zeros((R,), tl.float32)
        plain = tl.zeros((R,), tl.float32)
        number = tl.zeros((R,), tl.float32)
        picked = tl.zeros((R,), tl.float32)
        best = tl.full((R,), float("inf"), tl.float32)
        for i in range(0, count, SPANS):
            span, there = _spans_at(i, count, each, SPANS)
            part = at + span
            shift = tl.load(part, there, LOG_ZERO) - top[None, :]
            part += stride
            weight = tl.load(part, there, 0.0)
            total += tl.sum(weight * exp(shift), 0)
            part += stride
            if ENTROPY:
                weighted += tl.sum(rescaled(tl.load(part, there, 0.0), shift, weight), 0)
                part += stride
            if SMOOTHED:
                columns = tl.load(part + stride, there, 0.0)
                moved = tl.load(part, there, 0.0) + tl.where(there, shift, 0.0) * columns
                plain += tl.sum(moved, 0)
                number += tl.sum(columns, 0)
                part += 2 * stride
            if LABEL:
                picked += tl.sum(tl.load(part, there, 0.0), 0)
                part += stride
            if PREDICTED:
                found = tl.where(shift == 0, tl.load(part, there, float("inf")), float("inf"))
                best = tl.minimum(best, tl.min(found, 0))
        write = (
            out + head * (2 + ENTROPY + 2 * SMOOTHED + LABEL + PREDICTED) * width.to(tl.int64) + r
        )
        tl.store(write, top, inside)
        tl.store(write + width, total, inside)
        write += 2 * width
        if ENTROPY:
            tl.store(write, weighted, inside)
            write += width
        if SMOOTHED:
            tl.store(write, plain, inside)
            tl.store(write + width, number, inside)
            write += 2 * width
        if LABEL:
            tl.store(write, picked, inside)
            write += width
        if PREDICTED:
            tl.store(write, best, inside)
            write += width
        at += (2 + ENTROPY + 2 * SMOOTHED + LABEL + PREDICTED) * stride
        if head == 0:
            top_s = top
            at_t = at
        else:
            if KIND != JSD:
                own = parts + tl.minimum(r, rows - 1)[None, :]
                cross = tl.zeros((R,), tl.float32)
                infinite = tl.zeros((R,), tl.float32)
                for i in range(0, count, SPANS):
                    span, there = _spans_at(i, count, each, SPANS)
                    shift_s = tl.load(own + span, there, LOG_ZERO) - top_s[None, :]
                    shift_t = tl.load(at_t + span, there, LOG_ZERO) - top[None, :]
                    part = at + span
                    other = tl.load(part, there, 0.0)
                    if KIND == FORWARD_KL:
                        weight = tl.load(at_t + span + stride, there, 0.0)
                        moved = rescaled(other, shift_t, weight, shift_s)
                    else:
                        weight = tl.load(own + span + stride, there, 0.0)
                        moved = rescaled(other, shift_s, weight, shift_t)
                    cross += tl.sum(tl.where(there, moved, 0.0), 0)
                    lost = tl.load(part + stride, there, 0.0)
                    infinite = tl.maximum(infinite, tl.max(lost, 0))
                tl.store(write, cross, inside)
                tl.store(write + width, infinite, inside)


@triton.jit
def _spans_at(first, count, each, SPANS: tl.constexpr):
    """(SPANS, 1) offsets of the spans from `first` on, and which of them there are."""
    span = first + tl.arange(0, SPANS)[:, None]
    return span.to(tl.int64) * each, span < count
