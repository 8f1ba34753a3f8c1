"""GRPO (Eq. 4-5), as the field settled on it (see README): clipped surrogate over group-normalised
rewards, token-level mean, asymmetric clip, groups without variance dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_kernels import fused_linear_logprob
from opsd_train.config.schema import Config, GrpoConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import head_options, student_run
from opsd_train.methods.ref_policy import RefPolicy
from opsd_train.model.families import LmHead
from opsd_train.model.policy import Policy


@dataclass(frozen=True)
class Constants:
    """(N,) log-probabilities that do not change while a rollout is trained on; None: not needed."""

    old: Tensor | None  # of the policy that the rollout began with
    ref: Tensor | None  # of the initial policy


class Grpo(Method):
    """Per token -w min(r A, clip(r) A) + kl_weight k3, with r the policy's ratio to its old self,
    w the truncated importance weight of the old policy against the sampler."""

    needs_rewards = True

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(config, policy)
        self.settings = config.grpo or GrpoConfig()
        self.updates = self.settings.updates
        self.temperature = config.rollout.temperature
        self.ref_policy = RefPolicy(policy, "initial") if self.settings.kl_weight else None

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        size = self.config.rollout.samples_per_prompt
        groups = [samples[first : first + size] for first in range(0, len(samples), size)]
        return [sample for group in groups for sample in self._weigh_group(group)]

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Constants]:
        nothing = [None] * len(groups)
        with torch.no_grad():
            # With one update the old policy is the present one, and the ratio starts at 1.
            old = (
                [student_run(self.policy, group, self._logprob) for group in groups]
                if self.updates > 1
                else None
            )
            ref = None
            if self.ref_policy is not None:
                with self.ref_policy.active():
                    ref = [student_run(self.policy, group, self._logprob) for group in groups]
        return [Constants(*pair) for pair in zip(old or nothing, ref or nothing, strict=True)]

    def loss(
        self, samples: Sequence[Sample], precomputed: Constants, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        def loss_fn(hidden: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Stats]:
            logprob, stats = self._logprob(hidden, head, target, return_stats=True)
            loss, columns = surrogate(logprob, samples, precomputed, self.settings, num_tokens)
            # What the rollout began with: a mismatch with the sampler is not our own updates.
            began = logprob.detach() if precomputed.old is None else precomputed.old
            return loss, {"logprob": began, "entropy": stats["entropy"], **columns}

        return student_run(self.policy, samples, loss_fn)

    def extra_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        size = self.config.rollout.samples_per_prompt
        groups = [samples[first : first + size] for first in range(0, len(samples), size)]
        same = sum(len({sample.correct for sample in group}) == 1 for group in groups)
        return {"groups_dropped": same / len(groups)}

    def state(self) -> dict[str, Tensor]:
        return self.ref_policy.state() if self.ref_policy else {}

    def _weigh_group(self, group: list[Sample]) -> list[Sample]:
        rewards = torch.tensor([float(sample.correct) for sample in group])
        if (rewards == rewards[0]).all():  # no sample is better than another: nothing to learn
            return [replace(sample, weight=0.0) for sample in group]
        advantages = rewards - rewards.mean()
        if self.settings.normalise_std:
            advantages = advantages / rewards.std()
        masked = self.settings.mask_truncated
        return [
            replace(s, advantage=a, weight=float(s.finished or not masked))
            for s, a in zip(group, advantages.tolist(), strict=True)
        ]

    def _logprob(self, hidden: Tensor, head: LmHead, target: Tensor, **options) -> object:
        return fused_linear_logprob(
            hidden,
            head.weight,
            target,
            temperature=self.config.rollout.temperature,  # the distribution that was sampled from
            **head_options(head),
            **options,
        )


def surrogate(
    logprob: Tensor,
    samples: Sequence[Sample],
    constants: Constants,
    settings: GrpoConfig,
    num_tokens: int,
) -> tuple[Tensor, Stats]:
    """The loss of (N,) log-probabilities, divided by `num_tokens`, and its statistics."""
    lengths = torch.tensor([len(sample.completion) for sample in samples])

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths).to(logprob)

    advantage = per_token([sample.advantage for sample in samples])
    weight = per_token([sample.weight for sample in samples])
    old = logprob.detach() if constants.old is None else constants.old
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    value = -torch.minimum(ratio * advantage, clipped * advantage)
    stats = {
        "ratio": ratio.detach(),
        "clipped": (clipped * advantage < ratio * advantage).float(),
    }
    if settings.importance_cap is not None:
        sampler = torch.tensor([p for sample in samples for p in sample.logprobs]).to(logprob)
        stats["importance"] = (old - sampler).exp().clamp(max=settings.importance_cap)
        value = value * stats["importance"]
    if constants.ref is not None:
        difference = constants.ref - logprob
        k3 = difference.exp() - difference - 1
        stats["kl"] = k3.detach()
        value = value + settings.kl_weight * k3
    return (value * weight).sum() / num_tokens, stats
