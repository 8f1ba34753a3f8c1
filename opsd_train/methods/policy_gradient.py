"""GRPO's policy gradient (Eq. 4-5): advantages of a group, and the clipped surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_train.config.method_schema import GrpoConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Stats
from opsd_train.methods.common import importance_weight, sampler_logprobs


@dataclass(frozen=True)
class FixedLogprobs:
    """(N,) log-probabilities that stay fixed while a rollout is trained on; None: not needed."""

    old: Tensor | None  # of the policy before the rollout's first update
    ref: Tensor | None  # of the initial policy


def groups_of(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """The samples of each problem, which are side by side."""
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def group_advantages(group: Sequence[Sample], settings: GrpoConfig) -> list[float] | None:
    """A = (r - mean r) / std r over a problem's samples (Eq. 4), with r 1 for a correct answer and
    0 for a wrong one; None if all rewards are the same."""
    rewards = torch.tensor([1.0 if sample.correct else 0.0 for sample in group])
    if (rewards == rewards[0]).all():
        return None
    advantages = rewards - rewards.mean()
    if settings.normalise_std:
        advantages = advantages / rewards.std()
    return advantages.tolist()


def groups_dropped(groups: Sequence[Sequence[Sample]]) -> float:
    """Share of the problems whose samples all got the same reward."""
    return sum(len({sample.correct for sample in group}) == 1 for group in groups) / len(groups)


def clipped(
    logprob: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Stats]:
    """(N,) -min(r A, clip(r) A) with r = exp(logprob - old), and the statistics `ratio` and
    `clipped`, 1 where the clip sets the value."""
    ratio = (logprob - old).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    value = -torch.minimum(ratio * advantage, bounded * advantage)
    binds = bounded * advantage < ratio * advantage
    return value, {"ratio": ratio.detach(), "clipped": binds.float()}


def surrogate(
    logprob: Tensor,
    samples: Sequence[Sample],
    fixed: FixedLogprobs,
    settings: GrpoConfig,
    num_tokens: int,
    positions: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The GRPO loss (Eq. 5) of (N,) log-probabilities: a sum over tokens divided by `num_tokens`.

    positions  (N,) weight of each token
    factor     (N,) of the policy gradient; the KL divergence does not have it

    Returns the scalar and (N,) statistics: those of `clipped`; `importance`, with `importance_cap`;
    and `kl`, with a reference policy, by the estimators of Schulman, "Approximating KL divergence"
    (2020).
    """
    lengths = torch.tensor([len(sample.completion) for sample in samples])

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths).to(logprob)

    advantage = per_token([sample.advantage for sample in samples])
    weight = per_token([sample.weight * sample.policy_weight for sample in samples])
    if positions is not None:
        weight = weight * positions
    old = logprob.detach() if fixed.old is None else fixed.old
    value, stats = clipped(logprob, old, advantage, settings.clip_low, settings.clip_high)
    if settings.importance_cap is not None:
        sampler = sampler_logprobs(samples).to(logprob)
        stats["importance"] = importance_weight(old, sampler, settings.importance_cap)
        value = value * stats["importance"]
    if factor is not None:
        value = value * factor
    if fixed.ref is not None:
        difference = fixed.ref - logprob
        k3 = settings.kl_estimator == "k3"
        kl = difference.exp() - difference - 1 if k3 else difference.square() / 2
        stats["kl"] = kl.detach()
        value = value + settings.kl_weight * kl
    return (value * weight).sum() / num_tokens, stats
