"""95 % confidence intervals: for a share, a paired difference of shares, a mean over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # the normal distribution's 97.5 % quantile
RESAMPLES = 10_000
_SEED = 20_260_118
_BATCH = 1_000  # resamples drawn at a time: a matrix of (resamples, problems)


def wilson(correct: float, count: float) -> tuple[float, float]:
    """Wilson's score interval for the share correct / count: (low, high)."""
    share = correct / count
    center = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    reach = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + (Z / count / 2) ** 2)
    return max(0.0, center - reach), min(1.0, center + reach)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> dict[str, object]:
    """Mean of after - before over the same problems, with a normal interval.

    The variance is that of the per-problem differences (-1, 0 or 1), as in McNemar's test.
    Returns `difference`, `interval` [low, high], and the counts `gained` and `lost`.
    """
    differences = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / max(count - 1, 1)
    reach = Z * math.sqrt(variance / count)
    return {
        "difference": mean,
        "interval": [mean - reach, mean + reach],
        "gained": differences.count(1),
        "lost": differences.count(-1),
    }


def bootstrap(
    values: np.ndarray,  # (problems, measures)
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval (low, high) for each measure's mean over problems.

    All measures share the resamples, and the seed is fixed, so equal values give equal intervals.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    count = len(values)
    rng = np.random.default_rng(_SEED)
    share = np.full(count, 1 / count)
    means = [
        rng.multinomial(count, share, size=_BATCH) @ values / count
        for _ in range(RESAMPLES // _BATCH)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high
