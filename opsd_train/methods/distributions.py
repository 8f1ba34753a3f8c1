"""What a teacher predicts at the completion tokens: hidden states and a head, or its top tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from opsd_kernels import fused_linear_topk
from opsd_kernels.integrations.heads import LmHead
from opsd_train.config.loss_schema import LossConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.common import head_options
from opsd_train.model.policy import Policy


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
