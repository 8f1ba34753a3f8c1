"""Several reductions over a program's columns in one.

Its threads synchronize once, and no terms wait in registers for the next reduction. The interpreter
loops over the elements of such a reduction, but not over those of a tl.sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def _add3_max(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, tl.maximum(d, h)


@triton.jit
def _add5_max(a, b, c, d, e, f, g, h, i, j, k, m):
    return a + g, b + h, c + i, d + j, e + k, tl.maximum(f, m)


@triton.jit
def block_max2(a, b):
    if _INTERPRETED:
        found = tl.max(a, 0), tl.max(b, 0)
    else:
        found = tl.reduce((a, b), 0, _max2)
    return found


@triton.jit
def block_sum2(a, b):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0)
    else:
        found = tl.reduce((a, b), 0, _add2)
    return found


@triton.jit
def block_sum4(a, b, c, d):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
    else:
        found = tl.reduce((a, b, c, d), 0, _add4)
    return found


@triton.jit
def block_sum3_max(a, b, c, d):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.max(d, 0)
    else:
        found = tl.reduce((a, b, c, d), 0, _add3_max)
    return found


@triton.jit
def block_sum5_max(a, b, c, d, e, f):
    if _INTERPRETED:
        found = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0), tl.sum(e, 0), tl.max(f, 0)
    else:
        found = tl.reduce((a, b, c, d, e, f), 0, _add5_max)
    return found
