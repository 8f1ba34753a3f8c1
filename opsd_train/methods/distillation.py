"""Losses of a student against a teacher: the teacher's distributions, and what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from opsd_kernels import (
    fused_linear_advantage,
    fused_linear_jsd,
    fused_linear_logprob,
    fused_linear_topk,
    policy_gradient_loss,
    topk_divergence,
)
from opsd_kernels.integrations.heads import LmHead
from opsd_train.config.method_schema import IMPORTANCE_CAP, LossConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Stats
from opsd_train.methods.common import (
    head_options,
    importance_weight,
    pair_options,
    sampler_logprobs,
    student_run,
    token_weights,
)
from opsd_train.model.policy import Policy

IGNORED = -100
"""A target that fused_linear_logprob leaves out."""


@dataclass(frozen=True)
class FullDistribution:
    """A teacher's distributions over the whole vocabulary, as hidden states and a head."""

    hidden: Tensor  # (N, D_t), at the completion tokens
    head: LmHead | None  # None: the student's head serves both
    tokens: Tensor | None = None  # (N,) int64, which of a micro-batch's tokens; None: all


@dataclass(frozen=True)
class TopTokens:
    """A teacher's most likely tokens at each completion token, at the loss's temperature."""

    ids: Tensor  # (N, k) int64
    logprob: Tensor  # (N, k) float32, largest first
    vocab_size: int  # entries of the vocabulary that the probabilities are over
    tokens: Tensor | None = None  # as above


Distribution = FullDistribution | TopTokens
"""What a teacher predicts at N completion tokens of a micro-batch."""


def teacher_distribution(
    policy: Policy,
    samples: Sequence[Sample],
    prompt: Literal["student", "teacher"],
    loss: LossConfig,
    *,
    head: LmHead | None = None,
    vocab_size: int | None = None,
) -> Distribution:
    """What `policy` predicts at the completion tokens, without gradient or logits.

    prompt      whose prompt it reads
    head        the head to remember with hidden states; None: the student's
    vocab_size  top_k: the entries of the vocabulary that student and teacher share; None: all
    """
    if prompt == "student":
        prompts = [sample.student_prompt for sample in samples]
    else:
        prompts = [_teacher_prompt(sample) for sample in samples]
    completions = [sample.completion for sample in samples]
    with torch.no_grad():
        if loss.objective == "top_k":
            return policy.run(prompts, completions, partial(_top_tokens, loss, vocab_size))
        return FullDistribution(policy.run(prompts, completions, lambda hidden, *_: hidden), head)


def distillation(
    policy: Policy,
    samples: Sequence[Sample],
    teachers: Sequence[Distribution],
    config: LossConfig,
    num_tokens: int,
    *,
    stale: bool = False,
) -> tuple[Tensor, Stats]:
    """Divergence (Eq. 6-7), over the vocabulary or the teacher's top k, or sampled-token loss
    (Eq. 9) of the student.

    teachers    one distribution at all of the samples' completion tokens, or several that share
                them out
    num_tokens  the step's loss tokens, which the sum over tokens is divided by
    stale       the samples are of older weights. Of the losses only the sampled token's is an
                estimate over samples of the present ones, so its tokens get an `importance_weight`;
                a divergence is computed from the distributions at whatever was sampled

    Returns the scalar loss and (N,) statistics. `divergence` among them is the divergence that is
    trained on; with the sampled token it is log s(y) - log t(y), an estimate of the reverse KL.
    With importance weights: `importance`.
    """
    weights = token_weights(samples, policy.device)
    # The completions of an evaluation are greedy, and have none.
    comparable = stale and config.objective == "sampled_token" and samples[0].logprobs is not None
    sampler = sampler_logprobs(samples).to(policy.device) if comparable else None

    def against(
        teacher: Distribution, hidden: Tensor, head: LmHead, target: Tensor
    ) -> tuple[Tensor, Stats]:
        own = slice(None) if teacher.tokens is None else teacher.tokens
        its_weights = None if weights is None else weights[own]
        student = (hidden[own], head, target[own], its_weights)
        if isinstance(teacher, TopTokens):
            return _top_k(*student, teacher, config, num_tokens)
        if config.objective == "full_vocabulary":
            return _full_vocabulary(*student, teacher, config, num_tokens)
        its_sampler = None if sampler is None else sampler[own]
        return _sampled_token(*student, its_sampler, teacher, config, num_tokens)

    def loss_fn(hidden: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Stats]:
        if teachers[0].tokens is None:
            return against(teachers[0], hidden, head, target)
        losses: list[Tensor] = []
        stats: Stats = {}
        for teacher in teachers:
            loss, columns = against(teacher, hidden, head, target)
            losses.append(loss)
            for name, column in columns.items():
                stats.setdefault(name, column.new_zeros(len(target)))[teacher.tokens] = column
        return torch.stack(losses).sum(), stats

    return student_run(policy, samples, loss_fn)


def _full_vocabulary(
    hidden: Tensor,
    head: LmHead,
    target: Tensor,
    weights: Tensor | None,
    teacher: FullDistribution,
    config: LossConfig,
    num_tokens: int,
) -> tuple[Tensor, Stats]:
    teacher_head = teacher.head or head
    loss, stats = fused_linear_jsd(
        hidden,
        head.weight,
        teacher.hidden,
        teacher_head.weight,
        target,
        beta=config.beta,
        token_clip=config.token_clip,
        token_weight=weights,
        num_tokens=num_tokens,
        return_stats=True,
        **pair_options(head, teacher_head, config.temperature),
    )
    return loss, stats


def _sampled_token(
    hidden: Tensor,
    head: LmHead,
    target: Tensor,
    weights: Tensor | None,
    sampler: Tensor | None,
    teacher: FullDistribution,
    config: LossConfig,
    num_tokens: int,
) -> tuple[Tensor, Stats]:
    teacher_head = teacher.head or head
    advantage, logprob = fused_linear_advantage(
        hidden,
        head.weight,
        teacher.hidden,
        teacher_head.weight,
        target,
        **pair_options(head, teacher_head, config.temperature),
    )
    stats = {"divergence": -advantage, "logprob": logprob.detach()}
    if sampler is not None:
        stats["importance"] = importance_weight(logprob, sampler, IMPORTANCE_CAP)
        weights = stats["importance"] if weights is None else stats["importance"] * weights
    loss = policy_gradient_loss(advantage, logprob, token_weight=weights, num_tokens=num_tokens)
    return loss, stats


def _top_k(
    hidden: Tensor,
    head: LmHead,
    target: Tensor,
    weights: Tensor | None,
    teacher: TopTokens,
    config: LossConfig,
    num_tokens: int,
) -> tuple[Tensor, Stats]:
    # The completion token is one more id for its statistic, unless it is among the teacher's.
    same = teacher.ids == target[:, None]
    known = same.any(-1)
    ids = torch.cat([teacher.ids, target.masked_fill(known, IGNORED)[:, None]], -1)
    found: Any = fused_linear_logprob(
        hidden,
        head.weight,
        ids,
        temperature=config.temperature,
        vocab_size=teacher.vocab_size,
        return_stats=True,
        **head_options(head),
    )
    logprob, stats = found
    divergence = topk_divergence(logprob[:, :-1], teacher.logprob, config.beta)
    value = divergence if weights is None else divergence * weights
    own = logprob.detach()
    label = torch.where(known, own[:, :-1].masked_fill(~same, 0).sum(-1), own[:, -1])
    return value.sum() / num_tokens, {
        "divergence": divergence.detach(),
        "student_entropy": stats["entropy"],
        "student_logprob": label,
    }


def _top_tokens(
    loss: LossConfig, vocab_size: int | None, hidden: Tensor, head: LmHead, _targets: Tensor
) -> TopTokens:
    """The head's most likely tokens after each of the hidden states (N, D)."""
    entries = vocab_size or head.weight.shape[0]
    logprob, ids, _ = fused_linear_topk(
        hidden,
        head.weight,
        min(loss.top_k, entries),
        temperature=loss.temperature,
        vocab_size=entries,
        **head_options(head),
    )
    return TopTokens(ids, logprob, entries)


def _teacher_prompt(sample: Sample) -> list[int]:
    assert sample.teacher_prompt is not None, "the method does not ask for the teacher's prompt"
    return sample.teacher_prompt
