"""GRPO (Eq. 4-5): a clipped surrogate over rewards normalised within each problem's group.

As later work uses it, the loss is a mean over tokens, not over samples; the clip is asymmetric; and
groups in which all samples got the same reward are dropped. Advantages (Eq. 4) are
A = (r - mean r) / std r over a group's rewards r, 1 for a correct answer and 0 for a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import fused_linear_logprob
from opsd_kernels.integrations.heads import LmHead
from opsd_train.config.method_schema import GrpoConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import (
    head_options,
    importance_weight,
    sampler_logprobs,
    student_run,
)
from opsd_train.methods.ref_policy import RefPolicy
from opsd_train.model.policy import Policy


@dataclass(frozen=True)
class FixedLogprobs:
    """(N,) log-probabilities that stay fixed while a rollout is trained on; None: not needed."""

    old: Tensor | None  # of the policy before the rollout's first update
    ref: Tensor | None  # of the initial policy


class Grpo(Method):
    """Per token -w min(r A, clip(r) A) + kl_weight k3.

    r is the policy's probability ratio to the old policy, w the truncated importance weight of the
    old policy to the sampler, and k3 the estimate of KL(policy || initial policy).
    """

    needs_rewards = True

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(config, policy)
        self.settings = config.grpo or GrpoConfig()
        self.updates = self.settings.updates
        self.temperature = config.rollout.temperature
        self.ref_policy = RefPolicy(policy, "initial") if self.settings.kl_weight else None

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        """Advantages (Eq. 4), and weight 0 for dropped groups and truncated samples."""
        return [
            sample for group in self._groups(samples) for sample in self._assign_in_group(group)
        ]

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[FixedLogprobs]:
        """Log-probabilities of the old and of the initial policy, where the loss needs them."""
        # With one update the old policy is the current one: the ratio is 1.
        needs_old = self.updates > 1
        with torch.no_grad():
            old = [self._logprobs(group) if needs_old else None for group in groups]
            if self.ref_policy is None:
                return [FixedLogprobs(logprob, None) for logprob in old]
            with self.ref_policy.active():
                ref = [self._logprobs(group) for group in groups]
        return [FixedLogprobs(*pair) for pair in zip(old, ref, strict=True)]

    def loss(
        self, samples: Sequence[Sample], precomputed: FixedLogprobs, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """The surrogate (Eq. 5) of one micro-batch; statistics `logprob`, of the old policy,
        `entropy` and those of `surrogate`."""

        def loss_fn(hidden: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Stats]:
            logprob, stats = self._logprob(hidden, head, target, return_stats=True)
            loss, columns = surrogate(logprob, samples, precomputed, self.settings, num_tokens)
            # The old policy's, so that our own updates do not count as a mismatch with the sampler.
            old = logprob.detach() if precomputed.old is None else precomputed.old
            return loss, {"logprob": old, "entropy": stats["entropy"], **columns}

        return student_run(self.policy, samples, loss_fn)

    def extra_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`groups_dropped`: share of the problems whose samples all got the same reward."""
        groups = self._groups(samples)
        same = sum(len({sample.correct for sample in group}) == 1 for group in groups)
        return {"groups_dropped": same / len(groups)}

    def state(self) -> dict[str, Tensor]:
        """The initial policy's weights, where they are a copy."""
        return self.ref_policy.state() if self.ref_policy else {}

    def _groups(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """The samples of each problem."""
        size = self.config.rollout.samples_per_prompt
        return [samples[first : first + size] for first in range(0, len(samples), size)]

    def _assign_in_group(self, group: Sequence[Sample]) -> list[Sample]:
        rewards = torch.tensor([1.0 if sample.correct else 0.0 for sample in group])
        if (rewards == rewards[0]).all():  # all advantages are 0
            return [replace(sample, weight=0.0) for sample in group]
        advantages = rewards - rewards.mean()
        if self.settings.normalise_std:
            advantages = advantages / rewards.std()
        masked = self.settings.mask_truncated
        return [
            replace(s, advantage=a, weight=float(s.finished or not masked))
            for s, a in zip(group, advantages.tolist(), strict=True)
        ]

    def _logprobs(self, samples: Sequence[Sample]) -> Tensor:
        return student_run(self.policy, samples, self._logprob)

    def _logprob(self, hidden: Tensor, head: LmHead, target: Tensor, **options: Any) -> Any:
        return fused_linear_logprob(
            hidden,
            head.weight,
            target,
            temperature=self.config.rollout.temperature,  # of the distribution sampled from
            **head_options(head),
            **options,
        )


def surrogate(
    logprob: Tensor,
    samples: Sequence[Sample],
    fixed: FixedLogprobs,
    settings: GrpoConfig,
    num_tokens: int,
) -> tuple[Tensor, Stats]:
    """The GRPO loss (Eq. 5) of (N,) log-probabilities: a sum over tokens divided by `num_tokens`.

    Returns the scalar and (N,) statistics: `ratio`; `clipped`, 1 where the clip sets the value;
    `importance`, with `importance_cap`; and `kl`, with a reference policy, the estimator k3
    (Schulman, "Approximating KL divergence", 2020).
    """
    lengths = torch.tensor([len(sample.completion) for sample in samples])

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths).to(logprob)

    advantage = per_token([sample.advantage for sample in samples])
    weight = per_token([sample.weight for sample in samples])
    old = logprob.detach() if fixed.old is None else fixed.old
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    value = -torch.minimum(ratio * advantage, clipped * advantage)
    stats = {
        "ratio": ratio.detach(),
        "clipped": (clipped * advantage < ratio * advantage).float(),
    }
    if settings.importance_cap is not None:
        sampler = sampler_logprobs(samples).to(logprob)
        stats["importance"] = importance_weight(old, sampler, settings.importance_cap)
        value = value * stats["importance"]
    if fixed.ref is not None:
        difference = fixed.ref - logprob
        k3 = difference.exp() - difference - 1
        stats["kl"] = k3.detach()
        value = value + settings.kl_weight * k3
    return (value * weight).sum() / num_tokens, stats
