"""Tokens that two methods generate for the same held-out accuracy (the paper's Figure 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.study.outcomes import Outcomes
from benchmarks.study.statistics import by_seed, seed_weights

# Draws without a ratio are left out of its interval; with more than this share there is none.
MOST_UNDEFINED = 0.05


@dataclass(frozen=True)
class Ratio:
    """Tokens of the second method over those of the first, at the same accuracy.

    `value` is inf where the second never rises above the model before training, 0 where the first
    never does, nan where neither does.
    """

    value: float
    interval: tuple[float, float] | None
    level: float  # the accuracy: the highest that both reach
    best: tuple[float, float]  # the highest of each
    draws: np.ndarray


def token_ratio(first: Outcomes, second: Outcomes) -> Ratio:
    """At the highest accuracy that both reach: the lower of the two highest means over seeds.

    A method has reached an accuracy once the running maximum of its mean curve has; between two
    evaluations by linear interpolation.
    """
    curves = [_curve(outcomes) for outcomes in (first, second)]
    value = _ratios(*[(tokens[:1], means[:1]) for tokens, means in curves]).item()
    draws = _ratios(*[(tokens[1:], means[1:]) for tokens, means in curves])
    best = tuple(float(means[0].max()) for _, means in curves)
    return Ratio(value, _interval(draws), min(best), best, draws)


def geometric_mean(ratios: Sequence[Ratio]) -> tuple[float, tuple[float, float] | None]:
    """Over tasks, with its interval."""
    logs = [[ratio.value, *ratio.draws] for ratio in ratios]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.exp(np.log(logs).mean(0))
    return float(means[0]), _interval(means[1:])


def reach(tokens: np.ndarray, means: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Tokens (rows,) at which each row's running maximum is at `level` (rows,); inf for never.

    tokens, means: (rows, evaluations), tokens ascending.
    """
    best = np.maximum.accumulate(means, 1)
    there = best >= level[:, None]
    index = there.argmax(1)
    rows = np.arange(len(best))
    before = np.maximum(index - 1, 0)
    low, high = best[rows, before], best[rows, index]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(index > 0, (level - low) / (high - low), 0)
    start, end = tokens[rows, before], tokens[rows, index]
    return np.where(there.any(1), start + part * (end - start), math.inf)


def _curve(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mean accuracy, (1 + REPLICATES, evaluations) each: the value, then the draws."""
    weights = seed_weights(outcomes.ids)
    means = np.einsum("bs,bsc->bc", weights, by_seed(outcomes.task, outcomes.values))
    value = outcomes.values.mean((0, 2))
    tokens = np.concatenate([outcomes.tokens.mean(0)[None], weights @ outcomes.tokens])
    return tokens, np.concatenate([value[None], means])


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
    if len(defined) < (1 - MOST_UNDEFINED) * len(draws):
        return None
    # Of the draws themselves: between a number and infinity there is nothing to interpolate.
    low, high = np.quantile(defined, (0.025, 0.975), method="inverted_cdf").tolist()
    return low, high
