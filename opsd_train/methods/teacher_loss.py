"""The loss of opsd and distill over one micro-batch: the terms against the teacher, and with `grpo`
the policy gradient beside them; and how much of the step each sample is of each term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import fused_linear_advantage
from opsd_kernels.integrations.heads import LmHead
from opsd_train.config.loss_schema import PositionsConfig
from opsd_train.config.method_schema import GrpoConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.contexts import has_context
from opsd_train.methods.base import Stats
from opsd_train.methods.common import (
    divergence_weights,
    pair_options,
    sampler_logprobs,
    student_run,
)
from opsd_train.methods.distributions import Distribution, FullDistribution
from opsd_train.methods.objective import Terms, Tokens, against_teachers, student_logprob
from opsd_train.methods.policy_gradient import FixedLogprobs, group_advantages, groups_of, surrogate
from opsd_train.methods.token_weights import (
    TokenFacts,
    counted,
    found_weight,
    position_weight,
)
from opsd_train.model.policy import Policy


@dataclass(frozen=True)
class Fixed:
    """What stays as it is while a rollout is trained on, of one micro-batch."""

    teachers: list[Distribution]
    old: Tensor | None = None  # (N,) the student's log-probabilities before the first update
    advantage: Tensor | None = None  # (N,) log t(y) - log s(y) at that time
    ref: Tensor | None = None  # (N,) log-probabilities of the initial policy


class TeacherLoss:
    """The sum of the recipe's terms."""

    def __init__(self, config: Config, policy: Policy) -> None:
        self._config, self._loss, self._policy = config, config.loss, policy
        self._grpo = config.grpo if config.method == "opsd" else None
        rollout = config.rollout
        several = config.updates_per_step > 1
        self._stale = bool(rollout.ahead) or several
        own = self._loss.at_samples or self._loss.weight == 0
        self._needs_old = several and (own or self._grpo is not None)
        self._needs_advantage = several and own
        # Between the sampler and the student; a recipe with another weight was refused.
        self._compares = bool(self._loss.token_weight.importance_cap) or (
            self._stale and self._loss.at_samples
        )

    def assign(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their weights in each term, so that each term is a mean over the tokens
        that count in it, and with advantages; a sample that counts in none has weight 0.

        A teacher without a context for a sample, or a group of equal rewards, leaves it out of that
        term.
        """
        made = [replace(sample, divergence_weight=float(has_context(sample))) for sample in samples]
        if self._grpo is not None:
            made = self._with_advantages(made)
        divergence = self._loss.weight > 0 or self._loss.forward_kl is not None
        made = [
            sample
            if (divergence and sample.divergence_weight) or (self._grpo and sample.policy_weight)
            else replace(sample, weight=0.0)
            for sample in made
        ]
        policy = self._grpo.token_weight if self._grpo else PositionsConfig()
        return _means(made, self._loss.token_weight, policy)

    def fix(
        self, samples: Sequence[Sample], teachers: list[Distribution], ref: Tensor | None = None
    ) -> Fixed:
        """What `loss` needs for several updates; without gradient."""
        if not self._needs_old:
            return Fixed(teachers, ref=ref)

        def before(hidden: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Tensor | None]:
            tokens = Tokens(hidden, head, target, TokenFacts.of(samples, hidden.device))
            if not self._needs_advantage:
                return student_logprob(tokens, self._loss.temperature), None
            return self._advantage(tokens, teachers)

        with torch.no_grad():
            old, advantage = student_run(self._policy, samples, before)
        return Fixed(teachers, old, advantage, ref)

    def loss(
        self, samples: Sequence[Sample], fixed: Fixed, num_tokens: int, step: int
    ) -> tuple[Tensor, Stats]:
        """The scalar loss and (N,) statistics; see `against_teachers` and `surrogate`."""

        def loss_fn(hidden: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Stats]:
            tokens = self._tokens(samples, fixed, step, hidden, head, target)
            terms = against_teachers(tokens, fixed.teachers, self._loss, num_tokens)
            if self._grpo is not None and not _greedy(samples, self._grpo):
                self._add_policy_gradient(terms, tokens, samples, fixed, num_tokens)
            return terms.loss, terms.stats

        return student_run(self._policy, samples, loss_fn)

    def _tokens(
        self,
        samples: Sequence[Sample],
        fixed: Fixed,
        step: int,
        hidden: Tensor,
        head: LmHead,
        target: Tensor,
    ) -> Tokens:
        facts = replace(TokenFacts.of(samples, hidden.device), step=step)
        # The completions of an evaluation are greedy, and have none.
        if self._compares and samples[0].logprobs is not None:
            facts = replace(facts, sampler=sampler_logprobs(samples).to(hidden.device))
        weight = divergence_weights(samples, hidden.device)
        positions = position_weight(self._loss.token_weight, facts)
        if positions is not None:
            weight = positions if weight is None else weight * positions
        return Tokens(
            hidden, head, target, facts, weight, fixed.old, fixed.advantage, stale=self._stale
        )

    def _add_policy_gradient(
        self,
        terms: Terms,
        tokens: Tokens,
        samples: Sequence[Sample],
        fixed: Fixed,
        num_tokens: int,
    ) -> None:
        assert self._grpo is not None
        logprob = terms.logprob
        if logprob is None:
            logprob = student_logprob(tokens, self._loss.temperature)
        advantage = torch.tensor([sample.advantage for sample in samples]).to(logprob)
        facts = replace(
            tokens.facts,
            delta=terms.delta,
            logprob=logprob.detach(),
            advantage=advantage[tokens.facts.sample],
        )
        loss, stats = surrogate(
            logprob,
            samples,
            FixedLogprobs(fixed.old, fixed.ref),
            self._grpo,
            num_tokens,
            position_weight(self._grpo.token_weight, facts),
            found_weight(self._grpo.token_weight, facts),
        )
        counts = torch.tensor([s.policy_weight > 0 for s in samples]).to(logprob.device)
        left_out = ~counts[tokens.facts.sample]
        stats = {name: column.masked_fill(left_out, torch.nan) for name, column in stats.items()}
        terms.loss = terms.loss + self._grpo.weight * loss
        own = logprob.detach() if fixed.old is None else fixed.old
        terms.stats = terms.stats | stats | {"logprob": own}

    def _advantage(self, tokens: Tokens, teachers: Sequence[Distribution]) -> tuple[Tensor, Tensor]:
        """(N,) log s(y), and log t(y) - log s(y)."""
        logprob = torch.zeros(len(tokens.target), device=tokens.target.device)
        advantage = logprob.clone()
        for teacher in teachers:
            assert isinstance(teacher, FullDistribution)
            part, which = tokens.part(teacher.tokens), teacher.tokens
            head = teacher.head or part.head
            options: Any = pair_options(part.head, head, self._loss.temperature)
            found = fused_linear_advantage(
                part.hidden, part.head.weight, teacher.hidden, head.weight, part.target, **options
            )
            where = slice(None) if which is None else which
            advantage[where], logprob[where] = (column.to(logprob) for column in found)
        return logprob, advantage

    def _with_advantages(self, samples: Sequence[Sample]) -> list[Sample]:
        assert self._grpo is not None
        made, masked = [], self._grpo.mask_truncated
        for group in groups_of(samples, self._config.rollout.samples_per_prompt):
            advantages = group_advantages(group, self._grpo) or [0.0] * len(group)
            made += [
                replace(s, advantage=a, policy_weight=float(a != 0 and (s.finished or not masked)))
                for s, a in zip(group, advantages, strict=True)
            ]
        return made


def _greedy(samples: Sequence[Sample], grpo: GrpoConfig) -> bool:
    """Whether these are the completions of an evaluation, which have no policy gradient."""
    return grpo.importance_cap is not None and samples[0].logprobs is None


def _means(
    samples: Sequence[Sample], divergence: PositionsConfig, policy: PositionsConfig
) -> list[Sample]:
    """The samples with the weights of each term scaled to a mean over the tokens counted in it.

    The loss is divided by all tokens of the samples with a weight, so a term that counts fewer is
    scaled up.
    """
    trained = [sample for sample in samples if sample.weight > 0]
    tokens = sum(len(sample.completion) for sample in trained)

    def scale(name: str, weights: PositionsConfig) -> float:
        each = [counted(weights, len(s.completion)) for s in trained if getattr(s, name) > 0]
        return tokens / sum(each) if sum(each) else 0.0

    scales = {
        "divergence_weight": scale("divergence_weight", divergence),
        "policy_weight": scale("policy_weight", policy),
    }
    return [
        replace(s, **{name: getattr(s, name) * by for name, by in scales.items()}) for s in samples
    ]
