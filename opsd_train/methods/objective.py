"""The loss against a teacher as a sum of terms, each a weighted sum over tokens.

`loss.objective` (full vocabulary, Eq. 6-8; top k; sampled token, Eq. 9; log ratio),
`loss.forward_kl` and `loss.long_term`. `teacher_loss.py` adds the policy gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import (
    fused_linear_advantage,
    fused_linear_jsd,
    fused_linear_logprob,
    policy_gradient_loss,
    topk_divergence,
)
from opsd_kernels.integrations.heads import LmHead
from opsd_train.config.loss_schema import IMPORTANCE_CAP, LossConfig
from opsd_train.methods.base import Stats
from opsd_train.methods.common import head_options, importance_weight, pair_options
from opsd_train.methods.distributions import Distribution, FullDistribution, TopTokens
from opsd_train.methods.policy_gradient import clipped
from opsd_train.methods.token_weights import TokenFacts, found_weight, has_found, sums_before

IGNORED = -100
"""A target that fused_linear_logprob leaves out."""


@dataclass(frozen=True)
class Tokens:
    """What a student's pass gives of a micro-batch's N completion tokens, and their weights.

    With several updates on one rollout: `old`, the student's log-probabilities before the first of
    them, and `advantage`, log t - log s at that time. Each (N,).
    """

    hidden: Tensor  # (N, D)
    head: LmHead
    target: Tensor  # int64
    facts: TokenFacts
    weight: Tensor | None = None  # of the divergence; None: all 1
    old: Tensor | None = None
    advantage: Tensor | None = None
    stale: bool = False  # sampled by older weights

    def part(self, which: Tensor | None) -> Tokens:
        """Those of the tokens with these indices; None: all."""
        if which is None:
            return self

        def cut(column: Tensor | None) -> Any:
            return None if column is None else column[which]

        names = ("sample", "position", "sampler", "advantage")
        facts = replace(self.facts, **{name: cut(getattr(self.facts, name)) for name in names})
        mine = {
            n: cut(getattr(self, n)) for n in ("hidden", "target", "weight", "old", "advantage")
        }
        return replace(self, facts=facts, **mine)


@dataclass
class Terms:
    """A loss with its (N,) statistics, and what the policy gradient needs of the same products."""

    loss: Tensor
    stats: Stats = field(default_factory=dict)
    logprob: Tensor | None = None  # (N,) log s(y), differentiable
    delta: Tensor | None = None  # (N,) log t(y) - log s(y)


def against_teachers(
    tokens: Tokens, teachers: Sequence[Distribution], config: LossConfig, num_tokens: int
) -> Terms:
    """The terms of `config` against one teacher of all tokens, or several that share them out.

    The loss is a sum over tokens divided by `num_tokens`. Statistics are NaN where a token has no
    weight in it. `divergence` among them is the divergence that is trained on; with the sampled
    token it is log s(y) - log t(y), an estimate of the reverse KL.
    """
    if teachers[0].tokens is None:
        return _against(tokens, teachers[0], config, num_tokens)
    losses: list[Tensor] = []
    stats: Stats = {}
    for teacher in teachers:
        terms = _against(tokens.part(teacher.tokens), teacher, config, num_tokens)
        losses.append(terms.loss)
        for name, column in terms.stats.items():
            whole = stats.setdefault(name, column.new_full((len(tokens.target),), torch.nan))
            whole[teacher.tokens] = column
    return Terms(torch.stack(losses).sum(), stats)


def _against(tokens: Tokens, teacher: Distribution, config: LossConfig, num_tokens: int) -> Terms:
    if isinstance(teacher, TopTokens):
        terms = _top_k(tokens, teacher, config, num_tokens)
    elif config.at_samples or config.weight == 0:
        terms = _at_samples(tokens, teacher, config, num_tokens)
    else:
        terms = _full_vocabulary(tokens, teacher, config, num_tokens)
    if config.forward_kl and isinstance(teacher, FullDistribution):
        loss, terms.stats["forward_kl"] = _forward_kl(tokens, teacher, config, num_tokens)
        terms.loss = terms.loss + loss
    if tokens.weight is not None:
        left_out = tokens.weight == 0
        known = ("logprob",)  # of every token
        terms.stats = {
            name: column if name in known else column.masked_fill(left_out, torch.nan)
            for name, column in terms.stats.items()
        }
    return terms


def _full_vocabulary(
    tokens: Tokens, teacher: FullDistribution, config: LossConfig, num_tokens: int
) -> Terms:
    divergence: Any = fused_linear_jsd
    options = dict(
        beta=config.beta,
        token_clip=config.token_clip,
        token_weight=tokens.weight,
        return_stats=True,
        **_pair(tokens, teacher, config),
    )
    inputs = tokens.hidden, tokens.head.weight, teacher.hidden, _head(tokens, teacher).weight
    if not has_found(config.token_weight) and not config.long_term:
        loss, stats = divergence(*inputs, tokens.target, num_tokens=num_tokens, **options)
        return Terms(config.weight * loss, stats, delta=_delta(stats))
    value, stats = divergence(*inputs, tokens.target, reduction="none", **options)
    delta = _delta(stats)
    facts = replace(tokens.facts, delta=delta, logprob=stats["student_logprob"])
    factor = found_weight(config.token_weight, facts)
    terms = Terms(_mean(value, factor, num_tokens) * config.weight, stats, delta=delta)
    if config.long_term:
        terms.logprob = student_logprob(
            tokens, config.temperature, **_shared(tokens, teacher, config)
        )
        weight = _times(tokens.weight, factor)
        value = -following_mean(facts, delta) * terms.logprob
        terms.loss = terms.loss + config.long_term * _mean(value, weight, num_tokens)
    return terms


def _at_samples(
    tokens: Tokens, teacher: FullDistribution, config: LossConfig, num_tokens: int
) -> Terms:
    if tokens.advantage is None:
        advantage, logprob = fused_linear_advantage(
            tokens.hidden,
            tokens.head.weight,
            teacher.hidden,
            _head(tokens, teacher).weight,
            tokens.target,
            **_pair(tokens, teacher, config),
        )
    else:
        shared = _shared(tokens, teacher, config)
        advantage, logprob = (
            tokens.advantage,
            student_logprob(tokens, config.temperature, **shared),
        )
    old = logprob.detach() if tokens.old is None else tokens.old
    delta = advantage if tokens.weight is None else advantage.masked_fill(tokens.weight == 0, 0)
    terms = Terms(logprob.new_zeros(()), {"divergence": -advantage, "logprob": old}, logprob, delta)
    if config.weight == 0:  # the policy gradient alone
        return terms
    facts = replace(tokens.facts, delta=delta, logprob=old)
    weight = _times(tokens.weight, found_weight(config.token_weight, facts))
    if tokens.stale and facts.sampler is not None:
        terms.stats["importance"] = importance_weight(old, facts.sampler, IMPORTANCE_CAP)
        weight = _times(weight, terms.stats["importance"])
    if config.objective == "log_ratio":
        loss = _mean(advantage + old - logprob, weight, num_tokens)
    elif tokens.advantage is None:
        loss = policy_gradient_loss(advantage, logprob, token_weight=weight, num_tokens=num_tokens)
    else:
        value, stats = clipped(logprob, old, advantage, config.clip_low, config.clip_high)
        loss, terms.stats = _mean(value, weight, num_tokens), terms.stats | stats
    terms.loss = config.weight * loss
    return terms


def _top_k(tokens: Tokens, teacher: TopTokens, config: LossConfig, num_tokens: int) -> Terms:
    # The completion token is one more id for its statistic, unless it is among the teacher's.
    same = teacher.ids == tokens.target[:, None]
    known = same.any(-1)
    ids = torch.cat([teacher.ids, tokens.target.masked_fill(known, IGNORED)[:, None]], -1)
    found: Any = fused_linear_logprob(
        tokens.hidden,
        tokens.head.weight,
        ids,
        temperature=config.temperature,
        vocab_size=teacher.vocab_size,
        return_stats=True,
        **head_options(tokens.head),
    )
    logprob, stats = found
    divergence = topk_divergence(logprob[:, :-1], teacher.logprob, config.beta)
    own = torch.where(known, logprob[:, :-1].masked_fill(~same, 0).sum(-1), logprob[:, -1])
    factor = found_weight(config.token_weight, replace(tokens.facts, logprob=own.detach()))
    loss = _mean(divergence, _times(tokens.weight, factor), num_tokens)
    columns = {
        "divergence": divergence.detach(),
        "student_entropy": stats["entropy"],
        "student_logprob": own.detach(),
    }
    return Terms(config.weight * loss, columns, logprob=own)


def _forward_kl(
    tokens: Tokens, teacher: FullDistribution, config: LossConfig, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """The forward KL at tokens where the teacher's entropy is high, and which tokens those are.

    EOPD (arXiv 2603.07079) adds it to a reverse KL, which stays as it is on every token; its code
    takes the teacher's 16 most likely tokens.
    """
    assert config.forward_kl is not None
    divergence: Any = fused_linear_jsd
    value, stats = divergence(
        tokens.hidden,
        tokens.head.weight,
        teacher.hidden,
        _head(tokens, teacher).weight,
        beta=0.0,
        token_weight=tokens.weight,
        reduction="none",
        return_stats=True,
        **_pair(tokens, teacher, config),
    )
    unsure = (stats["teacher_entropy"] >= config.forward_kl.min_entropy).float()
    return config.forward_kl.weight * _mean(value, unsure, num_tokens), unsure


def student_logprob(tokens: Tokens, temperature: float, **options: Any) -> Any:
    """(N,) log s(y), differentiable; see fused_linear_logprob for the options."""
    return fused_linear_logprob(
        tokens.hidden,
        tokens.head.weight,
        tokens.target,
        temperature=temperature,
        **head_options(tokens.head),
        **options,
    )


def following_mean(facts: TokenFacts, delta: Tensor) -> Tensor:
    """(N,) mean of delta over the tokens that follow in a completion; 0 for the last one.

    R^Norm of MiniLLM (arXiv 2306.08543, Eq. 6); its code starts the sum at the token itself.
    """
    before, total = sums_before(facts, delta)
    lengths = torch.bincount(facts.sample)[facts.sample]
    count = lengths - 1 - facts.position
    return torch.where(count > 0, (total - before - delta) / count.clamp(min=1), 0).to(delta)


def _head(tokens: Tokens, teacher: FullDistribution) -> LmHead:
    return teacher.head or tokens.head


def _pair(tokens: Tokens, teacher: FullDistribution, config: LossConfig) -> dict[str, Any]:
    return pair_options(tokens.head, _head(tokens, teacher), config.temperature)


def _shared(tokens: Tokens, teacher: FullDistribution, config: LossConfig) -> dict[str, Any]:
    """The vocabulary that log-probabilities are over, where the heads are padded differently."""
    return {"vocab_size": _pair(tokens, teacher, config)["vocab_size"]}


def _delta(stats: Stats) -> Tensor:
    """(N,) log t(y) - log s(y); 0 for tokens that the loss left out."""
    return stats["teacher_logprob"] - stats["student_logprob"]


def _times(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one * other


def _mean(value: Tensor, weight: Tensor | None, num_tokens: int) -> Tensor:
    """The weighted sum of the (N,) values, divided by `num_tokens`."""
    if weight is None:
        return value.sum() / num_tokens
    # Before the product: 0 times NaN is NaN, in the gradient too.
    return (torch.where(weight == 0, 0, value) * weight).sum() / num_tokens
