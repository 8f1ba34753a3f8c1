"""How many tokens two methods generate to reach the same held-out accuracy (Figure 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.study.outcomes import Outcomes
from benchmarks.study.statistics import by_seed, seed_weights

# Draws without a ratio are left out of the interval; if more than this share, there is no interval.
MAX_UNDEFINED = 0.05


@dataclass(frozen=True)
class Ratio:
    """Tokens of the second method over those of the first, at the same accuracy.

    `value` is inf if the second never rises above the model before training, 0 if the first never
    does, nan if neither does.
    """

    value: float
    interval: tuple[float, float] | None
    level: float  # the highest accuracy that both reach
    best: tuple[float, float]  # the highest accuracy of each
    draws: np.ndarray


def token_ratio(first: Outcomes, second: Outcomes) -> Ratio:
    """The ratio at the highest accuracy that both reach, the lower of the two highest means.

    Means are over seeds. A method reaches an accuracy when the running maximum of its mean curve
    does, interpolated linearly between evaluations.
    """
    curves = [_curve(outcomes) for outcomes in (first, second)]
    value = _ratios(*[(tokens[:1], means[:1]) for tokens, means in curves]).item()
    draws = _ratios(*[(tokens[1:], means[1:]) for tokens, means in curves])
    best = tuple(float(means[0].max()) for _, means in curves)
    return Ratio(value, _interval(draws), min(best), best, draws)


def geometric_mean(ratios: Sequence[Ratio]) -> tuple[float, tuple[float, float] | None]:
    """The geometric mean of the tasks' ratios, with its interval."""
    logs = [[ratio.value, *ratio.draws] for ratio in ratios]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.exp(np.log(logs).mean(0))
    return float(means[0]), _interval(means[1:])


def reach(tokens: np.ndarray, means: np.ndarray, level: np.ndarray) -> np.ndarray:
    """(rows,) tokens at which each row's running maximum reaches `level` (rows,); inf for never.

    `tokens` and `means` are (rows, evaluations); tokens ascend.
    """
    best = np.maximum.accumulate(means, 1)
    reached = best >= level[:, None]
    index = reached.argmax(1)
    rows = np.arange(len(best))
    before = np.maximum(index - 1, 0)
    low, high = best[rows, before], best[rows, index]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(index > 0, (level - low) / (high - low), 0)
    start, end = tokens[rows, before], tokens[rows, index]
    return np.where(reached.any(1), start + part * (end - start), math.inf)


def _curve(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """(1 + REPLICATES, evaluations) tokens and mean accuracy: the value, then the draws."""
    weights = seed_weights(outcomes.ids)
    means = np.einsum("bs,bsc->bc", weights, by_seed(outcomes.task, outcomes.values))
    value = outcomes.values.mean((0, 2))
    tokens = np.concatenate([outcomes.tokens.mean(0)[None], weights @ outcomes.tokens])
    # Rounded, as in by_seed: means that differ in the last bit are no rise.
    return tokens, np.concatenate([value[None], means]).round(9)


def _ratios(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    curves = first, second
    tops = [means.max(1) for _, means in curves]
    level = np.minimum(*tops)
    needed = [reach(tokens, means, level) for tokens, means in curves]
    rises = [top > means[:, 0] for top, (_, means) in zip(tops, curves, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = needed[1] / needed[0]
    ratios[rises[0] & ~rises[1]] = math.inf
    ratios[rises[1] & ~rises[0]] = 0
    ratios[~rises[0] & ~rises[1]] = math.nan
    return ratios


def _interval(draws: np.ndarray) -> tuple[float, float] | None:
    defined = draws[~np.isnan(draws)]
    if len(defined) < (1 - MAX_UNDEFINED) * len(draws):
        return None
    # Quantiles are draws themselves: interpolation with infinity has no meaning.
    low, high = np.quantile(defined, (0.025, 0.975), method="inverted_cdf").tolist()
    return low, high
