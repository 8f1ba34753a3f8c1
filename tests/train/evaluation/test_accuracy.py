"""Intervals against their definitions, and step statistics against hand-made ones."""

import math

import pytest

from opsd_train.reporting.intervals import Z, paired_difference, wilson


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (3, 10), (100, 200), (48, 48)])
def test_wilson_solves_its_equation(correct: int, count: int) -> None:
    """Each bound p is where |share - p| = z sqrt(p (1 - p) / n), or the end of the range."""
    share = correct / count
    for bound in wilson(correct, count):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / count))
        else:
            assert bound == pytest.approx(share, abs=1e-9)


def test_paired_difference() -> None:
    before = [False] * 60 + [True] * 40
    after = [True] * 30 + [False] * 30 + [False] * 10 + [True] * 30
    result = paired_difference(before, after)
    assert result["difference"] == pytest.approx(0.2)
    assert (result["gained"], result["lost"]) == (30, 10)
    low, high = result["interval"]
    deviation = math.sqrt((0.4 - 0.2**2) * 100 / 99 / 100)
    assert (low, high) == pytest.approx((0.2 - Z * deviation, 0.2 + Z * deviation))
    same = paired_difference(before, before)
    assert same["interval"] == [0.0, 0.0]
