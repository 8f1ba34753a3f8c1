"""Tokens for the same accuracy, against curves whose crossings are known."""

import math

import numpy as np
import pytest

from benchmarks.study.efficiency import geometric_mean, reach, token_ratio
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.statistics import seed_weights

PROBLEMS = 1000


def curve(shares, tokens, name: str, task: str = "sums", seeds: int = 2) -> Outcomes:
    """Easy problems are solved first, so that every draw keeps the order of the shares."""
    rows = [np.arange(PROBLEMS) < share * PROBLEMS for share in shares]
    ids = tuple(f"{name}-s{seed}" for seed in range(seeds))
    values = np.array([rows] * seeds, dtype=float)
    return Outcomes(task, ids, tuple(range(len(shares))), values, np.array([tokens] * seeds) * 1.0)


def test_reach_interpolates_between_evaluations():
    tokens = np.array([[0.0, 100, 200, 300]])
    means = np.array([[0.2, 0.4, 0.3, 0.6]])
    for level, truth in ((0.1, 0), (0.2, 0), (0.3, 50), (0.4, 100), (0.5, 250), (0.6, 300)):
        assert reach(tokens, means, np.array([level])) == pytest.approx([truth])
    assert reach(tokens, means, np.array([0.61])) == [math.inf]


def test_the_ratio_is_at_the_highest_accuracy_that_both_reach():
    quick = curve([0.2, 0.4, 0.6], [0, 100, 200], "opsd")
    slow = curve([0.2, 0.3, 0.5], [0, 1000, 2000], "grpo")
    ratio = token_ratio(quick, slow)
    assert ratio.level == pytest.approx(0.5)
    assert ratio.best == pytest.approx((0.6, 0.5))
    assert ratio.value == pytest.approx(2000 / 150)
    low, high = ratio.interval
    assert low <= ratio.value <= high < 2 * low
    assert token_ratio(slow, quick).value == pytest.approx(150 / 2000)


def test_the_same_problems_by_other_seeds_are_no_rise():
    values = np.zeros((3, 2, 990))
    for column, ends in enumerate(([70, 330], [190, 330])):  # of seed 0 the first, of 1 the rest
        values[0, column, : ends[0]] = values[1, column, ends[0] : ends[1]] = 1
    ids = ("grpo-s0", "grpo-s1", "grpo-s2")
    still = Outcomes("sums", ids, (0, 1), values, np.array([[0.0, 1000]] * 3))
    rising = np.tile(np.arange(990) < np.array([[100], [500]]), (3, 1, 1)) * 1.0
    quick = Outcomes("sums", ("a", "b", "c"), (0, 1), rising, np.array([[0.0, 100]] * 3))
    ratio = token_ratio(quick, still)
    both = (seed_weights(ids)[:, :2] == 0.5).all(1)
    assert both.any() and ratio.value == math.inf
    assert set(ratio.draws[both]) == {math.inf}


def test_a_fall_after_the_top_changes_nothing():
    slow = curve([0.2, 0.3, 0.5], [0, 1000, 2000], "grpo")
    rising = curve([0.2, 0.4, 0.6], [0, 100, 200], "opsd")
    falling = curve([0.2, 0.4, 0.6, 0.1], [0, 100, 200, 300], "opsd")
    assert token_ratio(falling, slow).value == pytest.approx(token_ratio(rising, slow).value)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [([0.2, 0.5], [0.2, 0.2], math.inf), ([0.2, 0.1], [0.2, 0.5], 0)],
)
def test_who_never_rises_never_reaches(first, second, value):
    ratio = token_ratio(curve(first, [0, 100], "a"), curve(second, [0, 1000], "b"))
    assert ratio.value == value
    assert ratio.interval == (value, value)


def test_where_neither_rises_there_is_no_ratio():
    ratio = token_ratio(curve([0.2, 0.1], [0, 100], "a"), curve([0.2, 0.2], [0, 100], "b"))
    assert math.isnan(ratio.value)
    assert ratio.interval is None


def test_the_mean_over_tasks_is_geometric():
    pairs = []
    for task, factor in (("a", 4), ("b", 9)):
        first = curve([0.2, 0.5], [0, 100], "x", task)
        pairs.append(token_ratio(first, curve([0.2, 0.5], [0, 100 * factor], "y", task)))
    value, interval = geometric_mean(pairs)
    assert value == pytest.approx(6)
    assert interval == pytest.approx((6, 6))
