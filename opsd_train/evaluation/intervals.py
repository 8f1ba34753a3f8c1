"""95 % intervals of a share and of a paired difference of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964


def wilson(correct: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of the share correct / count."""
    share = correct / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    reach = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + (Z / count / 2) ** 2)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> dict[str, object]:
    """Mean of after - before over the same problems, with its normal interval.

    The variance is that of the per-problem differences (-1, 0 or 1), as McNemar's test uses it.
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
