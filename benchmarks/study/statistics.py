"""Means over seeds and tasks, paired differences, and their bootstrap intervals.

What an interval covers. Each of REPLICATES draws resamples the held-out problems of a task, with
replacement, and the seeds of each arm. The problems are the same for all arms and seeds of a task,
and so are their draws: a difference between arms is paired over the problems. The tasks are what
they are: an interval is about other problems of these tasks, not about other tasks.

Seeds: of S seeds, S - 1 are drawn, which makes the variance right in expectation (S draws would
give (S - 1) / S of it; Rao and Wu 1988). The tails are still a normal's where Student's t with
S - 1 degrees of freedom would be due, so seeds that differ much are understated; with one seed
nothing of them is in the interval. Resampling problems and seeds at once counts the luck of one
seed with one problem more than once (Owen 2007), which widens the interval where seeds differ
little. Simulated, the 95 % interval of a difference on 120 problems holds

    standard deviation of seeds, points      2       5      10
    3 seeds                               99.8 %  98 %    94 %
    2 seeds                               99 %    98 %    92 %
    1 seed                                94 %    81 %    51 %

The best checkpoint, which the paper reports, is chosen on the problems it is measured on, and the
choice is not made again in the draws: value and interval are both too high for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.study.outcomes import Outcomes

REPLICATES = 4000
SEED = 7


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A value and its bootstrap draws, (REPLICATES,)."""

    value: float
    draws: np.ndarray

    def __sub__(self, other: Measured) -> Measured:
        """Paired: the draws of both are of the same problems."""
        return Measured(self.value - other.value, self.draws - other.draws)

    def estimate(self) -> Estimate:
        """Percentile interval; never beside the value."""
        low, high = np.quantile(self.draws, (0.025, 0.975)).tolist()
        return Estimate(self.value, min(low, self.value), max(high, self.value))


def measure(outcomes: Outcomes, column: int = -1) -> Measured:
    """Mean over seeds of a column; -1: after the last step."""
    values = outcomes.values[:, [column]]
    value = float(values.mean())
    draws = (by_seed(outcomes.task, values)[..., 0] * seed_weights(outcomes.ids)).sum(1)
    if value in (0, 1):
        draws = _none_or_all(outcomes, value)
    return Measured(value, draws)


def mean_curve(outcomes: Outcomes) -> list[Measured]:
    """Mean over seeds at each column."""
    return [measure(outcomes, column) for column in range(len(outcomes.columns))]


def average(parts: Sequence[Measured]) -> Measured:
    """Mean over tasks, each weighing the same; their problems are drawn independently."""
    draws = np.mean([part.draws for part in parts], 0)
    return Measured(float(np.mean([part.value for part in parts])), draws)


def by_seed(task: str, values: np.ndarray) -> np.ndarray:
    """Bootstrap means over the problems: (REPLICATES, seeds, columns), see Outcomes.values."""
    seeds, columns, problems = values.shape
    flat = values.reshape(seeds * columns, problems)
    weights = problem_weights(task, problems)
    # Rounded, since a sum of weights that is 1 but for its last bit would look like a change.
    return (weights @ flat.T).round(12).reshape(REPLICATES, seeds, columns)


@lru_cache(maxsize=32)
def problem_weights(task: str, problems: int) -> np.ndarray:
    """Share of each problem in each draw, the same for whoever asks: (REPLICATES, problems)."""
    shares = np.full(problems, 1 / problems)
    return _random(task).multinomial(problems, shares, size=REPLICATES) / problems


def seed_weights(ids: Sequence[str]) -> np.ndarray:
    """Share of each seed in each draw: (REPLICATES, seeds). The same runs get the same draws."""
    count = len(ids)
    if count == 1:
        return np.ones((REPLICATES, 1))
    draws = _random(*ids).multinomial(count - 1, np.full(count, 1 / count), size=REPLICATES)
    return draws / (count - 1)


def _none_or_all(outcomes: Outcomes, value: float) -> np.ndarray:
    """Draws where resampling only repeats "none right", or "all": the Jeffreys posterior.

    Beta(c + 1/2, n - c + 1/2) for c of n; n is the problems, as if the seeds were copies.
    """
    problems = outcomes.values.shape[2]
    right = value * problems
    return _random(*outcomes.ids).beta(right + 0.5, problems - right + 0.5, size=REPLICATES)


def _random(*names: str) -> np.random.Generator:
    return np.random.default_rng([SEED, zlib.crc32("/".join(names).encode())])
