"""GRPO (Eq. 4-5): a clipped surrogate over rewards normalised within each problem's group.

As later work uses it, the loss is a mean over tokens, not over samples; the clip is asymmetric; and
groups in which all samples got the same reward are dropped. Advantages (Eq. 4) are
A = (r - mean r) / std r over a group's rewards r, 1 for a correct answer and 0 for a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import fused_linear_logprob
from opsd_kernels.integrations.heads import LmHead
from opsd_train.config.method_schema import GrpoConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import head_options, logprobs, student_run
from opsd_train.methods.policy_gradient import (
    FixedLogprobs,
    group_advantages,
    groups_dropped,
    groups_of,
    surrogate,
)
from opsd_train.methods.ref_policy import RefPolicy
from opsd_train.model.policy import Policy


class Grpo(Method):
    """Per token -w min(r A, clip(r) A) + kl_weight k3.

    r is the policy's probability ratio to the old policy, w the truncated importance weight of the
    old policy to the sampler, and k3 the estimate of KL(policy || initial policy).
    """

    needs_rewards = True

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(config, policy)
        self.settings = config.grpo or GrpoConfig()
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
        needs_old = self.config.updates_per_step > 1
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
            found: Any = fused_linear_logprob(
                hidden,
                head.weight,
                target,
                temperature=self.temperature,  # of the distribution sampled from
                return_stats=True,
                **head_options(head),
            )
            logprob, stats = found
            loss, columns = surrogate(logprob, samples, precomputed, self.settings, num_tokens)
            # The old policy's, so that our own updates do not count as a mismatch with the sampler.
            old = logprob.detach() if precomputed.old is None else precomputed.old
            return loss, {"logprob": old, "entropy": stats["entropy"], **columns}

        return student_run(self.policy, samples, loss_fn)

    def extra_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`groups_dropped`: share of the problems whose samples all got the same reward."""
        return {"groups_dropped": groups_dropped(self._groups(samples))}

    def state(self) -> dict[str, Tensor]:
        """The initial policy's weights, where they are a copy."""
        return self.ref_policy.state() if self.ref_policy else {}

    def _groups(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """The samples of each problem."""
        return groups_of(samples, self.config.rollout.samples_per_prompt)

    def _assign_in_group(self, group: Sequence[Sample]) -> list[Sample]:
        advantages = group_advantages(group, self.settings)
        if advantages is None:  # all are 0
            return [replace(sample, weight=0.0) for sample in group]
        masked = self.settings.mask_truncated
        return [
            replace(s, advantage=a, weight=float(s.finished or not masked))
            for s, a in zip(group, advantages, strict=True)
        ]

    def _logprobs(self, samples: Sequence[Sample]) -> Tensor:
        return logprobs(self.policy, samples, self.temperature)
