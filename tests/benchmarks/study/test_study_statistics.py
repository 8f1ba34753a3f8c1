"""Means, differences and their intervals against closed forms and by simulation."""

import numpy as np
import pytest

from benchmarks.study.outcomes import Outcomes
from benchmarks.study.reading import verdict
from benchmarks.study.statistics import (
    Measured,
    average,
    mean_curve,
    measure,
    problem_weights,
    seed_weights,
)


def outcomes(values, task: str = "sums", name: str = "run") -> Outcomes:
    """values: (seeds, columns, problems)."""
    values = np.asarray(values, dtype=float)
    seeds, columns, _ = values.shape
    ids = tuple(f"{name}-s{seed}" for seed in range(seeds))
    tokens = np.tile(np.arange(columns) * 100.0, (seeds, 1))
    return Outcomes(task, ids, tuple(range(columns)), values, tokens)


def drawn(seed: int, *shape: int, chance: float = 0.4) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < chance


def test_the_value_is_the_mean_over_seeds_of_the_last_column():
    made = outcomes([[[1, 1, 1, 1], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 0]]])
    assert measure(made).value == 0.5
    assert measure(made, 0).value == 0.5
    assert [measured.value for measured in mean_curve(made)] == [0.5, 0.5]


def test_best_is_chosen_for_each_run_and_mean_is_over_its_evaluations():
    made = outcomes([[[1, 1, 1, 0], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]]])
    assert measure(made.best()).value == (0.75 + 0.5) / 2
    assert measure(made.mean()).value == (0.5 + 0.25) / 2
    assert made.best().tokens.tolist() == [[0], [100]]


def test_before_the_first_step_is_no_checkpoint():
    made = outcomes([[[1, 1], [0, 0], [1, 0]]])
    assert made.after_training().columns == (1, 2)
    assert measure(made.after_training().best()).value == 0.5
    only_before = Outcomes("sums", ("run",), (0,), made.values[:, :1], made.tokens[:, :1])
    assert only_before.after_training() is None


def test_one_seed_has_the_binomial_interval():
    made = outcomes([[np.arange(400) < 120]])
    estimate = measure(made).estimate()
    reach = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert estimate.low == pytest.approx(0.3 - reach, abs=0.004)
    assert estimate.high == pytest.approx(0.3 + reach, abs=0.004)


def test_seeds_add_their_variance():
    # Every problem of a seed is alike: the problems draw nothing, the seeds all.
    shares = [0.2, 0.4, 0.9]
    made = outcomes([[np.full(50, share)] for share in shares])
    draws = measure(made).draws
    assert draws.var() == pytest.approx(np.var(shares, ddof=1) / 3, rel=0.05)


def test_equal_seeds_are_worth_one():
    row = drawn(1, 200)
    one, three = measure(outcomes([[row]])), measure(outcomes([[row]] * 3))
    assert np.allclose(one.draws, three.draws)


def test_a_difference_is_paired_over_the_problems():
    before = drawn(2, 300)
    after = before.copy()
    after[np.flatnonzero(~before)[:12]] = True
    difference = measure(outcomes([[after]], name="a")) - measure(outcomes([[before]], name="b"))
    estimate = difference.estimate()
    # Only the 12 problems gained move: the variance is that of a share of 12 in 300.
    reach = 1.96 * np.sqrt(0.04 * 0.96 / 300)
    assert estimate.value == pytest.approx(0.04)
    assert estimate.low == pytest.approx(0.04 - reach, abs=0.004)
    assert estimate.high == pytest.approx(0.04 + reach, abs=0.004)


def test_tasks_weigh_the_same_and_are_drawn_apart():
    small, large = outcomes([[np.arange(100) < 50]], "a"), outcomes([[np.arange(400) < 40]], "b")
    both = average([measure(small), measure(large)])
    variance = (0.25 / 100 + 0.09 / 400) / 4
    assert both.value == pytest.approx(0.3)
    assert both.draws.var() == pytest.approx(variance, rel=0.08)


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0, 0.0124), (200, 0.9876, 1)])
def test_none_or_all_right_still_has_an_interval(right, low, high):
    # Jeffreys: the 97.5 % point of Beta(1/2, 200 1/2) is 0.01245.
    made = outcomes([[np.arange(200) < right]] * 3)
    estimate = measure(made).estimate()
    assert estimate.value == right / 200
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-3)


def test_an_arm_with_itself_differs_by_nothing():
    for values in (drawn(3, 3, 2, 50), np.zeros((3, 2, 50))):
        made = outcomes(values)
        estimate = (measure(made) - measure(made)).estimate()
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_an_interval_that_ends_at_0_but_for_rounding_tells_nothing():
    draws = np.full(4000, 0.1)
    draws[:200] = 1.6e-13
    for sign in (1, -1):
        estimate = Measured(sign * 0.09, sign * draws).estimate()
        assert 0 in (estimate.low, estimate.high)
        assert verdict(estimate, "first") == "cannot tell"


def test_the_same_study_gives_the_same_interval():
    made = outcomes(drawn(4, 3, 2, 100))
    first = measure(made).estimate()
    problem_weights.cache_clear()
    assert measure(made).estimate() == first


def test_draws_are_weights():
    assert np.allclose(problem_weights("sums", 7).sum(1), 1)
    assert np.allclose(seed_weights(["a", "b", "c"]).sum(1), 1)
    assert len(set(map(tuple, seed_weights(["a", "b", "c"])))) == 6  # 2 draws of 3


def test_intervals_hold_as_often_as_they_say():
    """Differences of two arms with three seeds; problems are of unequal difficulty."""
    random = np.random.default_rng(5)
    held, rounds, gain = 0, 200, 0.1
    for turn in range(rounds):
        hardness = random.uniform(0.1, 0.7, 120)
        arms = []
        for arm in range(2):
            luck = random.normal(0, 0.1, (3, 1, 1))
            chance = hardness + gain * arm + luck
            rows = random.random((3, 1, 120)) < chance
            arms.append(measure(outcomes(rows, name=f"{turn}-{arm}")))
        estimate = (arms[1] - arms[0]).estimate()
        held += estimate.low <= gain <= estimate.high
    assert 0.89 <= held / rounds <= 0.98, held / rounds
