"""The samples of a step, cut into batches by a token budget, and a batch as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from opsd_train.config.errors import UserError
from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """A completion under the student's prompt and, if the method has one, the teacher's."""

    problem: Problem
    student_prompt: list[int]
    teacher_prompt: list[int] | None
    completion: list[int]
    logprobs: list[float] | None = None  # the sampler's, in nats; None where not comparable
    finished: bool = True  # ended by a stop token
    correct: bool | None = None  # None where no answer was generated, or none is graded yet
    answer: str | None = None  # as the grader found it
    check_failed: str | None = None  # why the answer could not be graded: it counts as wrong
    weight: float = 1.0  # of its tokens in the loss; 0: left out
    advantage: float = 0.0  # grpo

    @property
    def longest(self) -> int:
        """Tokens of the longer prompt and the completion."""
        return max(len(self.student_prompt), len(self.teacher_prompt or ())) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Prompts with completions, right-padded or packed, and where each token is predicted.

    There is no attention mask: padding follows the tokens, and a causal model does not see it.
    """

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64
    rows: Tensor  # (N,) int64, the sample of each completion token, in order
    columns: Tensor  # (N,) int64, the position whose hidden state predicts it
    targets: Tensor  # (N,) int64, the completion tokens


def token_batches(
    items: Iterable[tuple[Item, int]], token_budget: int, packed: bool = False
) -> Iterator[list[Item]]:
    """Cut items, each given with its length in tokens, into batches of at most `token_budget`.

    Items keep their order, and a batch takes as many as fit. A padded batch of N items counts N
    times its longest one, a packed batch the sum of its lengths. An item longer than the budget
    is a batch of its own: callers that cannot have one check first.
    """
    batch: list[Item] = []
    total = width = 0  # of the batch: the sum of its lengths, the longest of them
    for item, length in items:
        total, width = total + length, max(width, length)
        if batch and (total if packed else (len(batch) + 1) * width) > token_budget:
            yield batch
            batch, total, width = [], length, length
        batch.append(item)
    if batch:
        yield batch


def micro_batches(
    samples: Iterable[Sample], token_budget: int, packed: bool = False
) -> Iterator[list[Sample]]:
    """Samples of similar length in batches of at most `token_budget` tokens, shortest first.

    Padding counts, unless the batches are packed. Raises UserError if a sample is longer than the
    budget.
    """
    ordered = sorted(samples, key=lambda sample: sample.longest)
    for sample in ordered:
        if sample.longest > token_budget:
            raise UserError(
                f"micro_batch_tokens={token_budget} is less than one sample: problem "
                f"{sample.problem.id} has {sample.longest} tokens; raise it"
            )
    return token_batches(((s, s.longest) for s in ordered), token_budget, packed)


def balanced_micro_batches(
    samples: Sequence[Sample],
    active: Sequence[Sample],
    token_budget: int,
    context: DistributedContext,
    packed: bool = False,
) -> list[list[Sample]]:
    """Micro-batches of this rank's `active` samples, the same number on every rank.

    Ranks with sharded weights run every forward and backward pass together. A rank with fewer
    micro-batches gets idle ones: a single token of samples[0], with weight 0.
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
    """Tensors on `device` for prompts and their completions, as token ids.

    Padded: a row for each sequence, the prompt, the completion, then `pad_id`. `packed`: one row
    of all sequences; position ids restart at 0 for each, which is how transformers' variable-length
    FlashAttention keeps them apart.
    """
    sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    width = sum(lengths) if packed else max(lengths)
    ids = torch.full((1 if packed else len(sequences), width), pad_id)
    positions = torch.arange(width).repeat(len(ids), 1)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
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
    return Batch(ids.to(device), positions.to(device), *(index.to(device) for index in indices))
