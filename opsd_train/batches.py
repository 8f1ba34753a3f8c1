"""Samples of a step, and their cut into micro-batches by a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_train.data import Problem
from opsd_train.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One completion under both prompts, as token ids."""

    problem: Problem
    student_prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]

    @property
    def longest(self) -> int:
        return max(len(self.student_prompt), len(self.teacher_prompt)) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Prompts and completions, right-padded, and where each completion token is predicted."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64
    rows: Tensor  # (N,) int64, the sample of each completion token, in order
    columns: Tensor  # (N,) int64, the position whose hidden state predicts it
    targets: Tensor  # (N,) int64, the completion tokens


def micro_batches(samples: Sequence[Sample], token_budget: int) -> Iterator[list[Sample]]:
    """Groups of similar length, each at most `token_budget` tokens with padding."""
    group: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: sample.longest):
        if sample.longest > token_budget:
            raise UserError(
                f"micro_batch_tokens={token_budget} is less than one sample: problem "
                f"{sample.problem.id} has {sample.longest} tokens; raise it"
            )
        if group and (len(group) + 1) * sample.longest > token_budget:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def make_batch(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    pad_id: int,
    device: torch.device,
) -> Batch:
    """Each completion follows its prompt without a gap; padding comes after both."""
    sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros_like(ids)
    rows, columns, targets = [], [], []
    for row, (sequence, prompt, completion) in enumerate(
        zip(sequences, prompts, completions, strict=True)
    ):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
        rows += [row] * len(completion)
        columns += range(len(prompt) - 1, len(sequence) - 1)
        targets += completion
    positions = torch.arange(width).expand(len(sequences), -1)
    indices = (torch.tensor(values, dtype=torch.long) for values in (rows, columns, targets))
    return Batch(*(tensor.to(device) for tensor in (ids, mask, positions, *indices)))
