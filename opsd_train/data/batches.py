"""Samples of a step, and their cut into micro-batches by a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_train.config.errors import UserError
from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext


@dataclass(frozen=True)
class Sample:
    """One completion under the student's prompt and, where the method has one, the teacher's."""

    problem: Problem
    student_prompt: list[int]
    teacher_prompt: list[int] | None
    completion: list[int]
    logprobs: list[float] | None = (
        None  # the sampler's, per token; None where it saw another prompt
    )
    finished: bool = True  # ended by a stop token
    correct: bool | None = None  # the answer check; None where nothing was generated, or not yet
    answer: str | None = None  # that the check found
    check_failed: str | None = None  # why, if it did: the answer then counts as wrong
    weight: float = 1.0  # of its tokens in the loss; 0 leaves it out
    advantage: float = 0.0  # grpo

    @property
    def longest(self) -> int:
        return max(len(self.student_prompt), len(self.teacher_prompt or ())) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Prompts with completions, right-padded or packed, and where each token is predicted.

    Nothing masks the padding: it follows what it pads, and a causal model looks back only.
    """

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64
    rows: Tensor  # (N,) int64, the sample of each completion token, in order
    columns: Tensor  # (N,) int64, the position whose hidden state predicts it
    targets: Tensor  # (N,) int64, the completion tokens


def micro_batches(
    samples: Sequence[Sample], token_budget: int, packed: bool = False
) -> Iterator[list[Sample]]:
    """Groups of similar length, each at most `token_budget` tokens: padding counts, where it is."""
    group: list[Sample] = []
    tokens = 0
    for sample in sorted(samples, key=lambda sample: sample.longest):
        if sample.longest > token_budget:
            raise UserError(
                f"micro_batch_tokens={token_budget} is less than one sample: problem "
                f"{sample.problem.id} has {sample.longest} tokens; raise it"
            )
        tokens = tokens + sample.longest if packed else (len(group) + 1) * sample.longest
        if tokens > token_budget:
            yield group
            group, tokens = [], sample.longest
        group.append(sample)
    if group:
        yield group


def balanced_micro_batches(
    samples: Sequence[Sample],
    active: Sequence[Sample],
    token_budget: int,
    context: DistributedContext,
    packed: bool = False,
) -> list[list[Sample]]:
    """Micro-batches of the `active` ones of this rank's samples, as many on every rank.

    Sharded models run forward and backward together: a rank with fewer runs idle ones, a single
    token of weight 0.
    """
    groups = list(micro_batches(active, token_budget, packed))
    first = samples[0]
    logprobs = first.logprobs and first.logprobs[:1]
    idle = replace(first, completion=first.completion[:1], logprobs=logprobs, weight=0.0)
    return groups + [[idle]] * (int(context.max(len(groups))) - len(groups))


def make_batch(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    pad_id: int,
    device: torch.device,
    packed: bool = False,
) -> Batch:
    """Each completion follows its prompt without a gap; padding comes after both.

    `packed`: one row without any padding; positions that start again at 0 part the sequences,
    which is what FlashAttention's variable-length kernels go by in transformers.
    """
    sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    width = sum(lengths) if packed else max(lengths)
    ids = torch.full((1 if packed else len(sequences), width), pad_id)
    positions = torch.arange(width).repeat(len(ids), 1)
    rows, columns, targets = [], [], []
    first = 0
    for row, (sequence, completion) in enumerate(zip(sequences, completions, strict=True)):
        row, end = (0, first + len(sequence)) if packed else (row, len(sequence))
        ids[row, first:end] = torch.tensor(sequence)
        positions[row, first:end] = torch.arange(len(sequence))
        rows += [row] * len(completion)
        columns += range(end - len(completion) - 1, end - 1)
        targets += completion
        first = end if packed else 0
    indices = (torch.tensor(values, dtype=torch.long) for values in (rows, columns, targets))
    rows, columns, targets = (tensor.to(device) for tensor in indices)
    return Batch(ids.to(device), positions.to(device), rows, columns, targets)
