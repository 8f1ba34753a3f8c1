"""Prompts with completions as a batch: which of them lie together in a row, and the tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which sequences are together in a row, and what keeps them apart.

    "padded"  a row each, padded to the longest
    "packed"  all in one row; positions restart at 0 for each
    "shared"  padded, but a prompt is there once, and completions of it follow in one row; a mask
    """

    kind: Literal["padded", "packed", "shared"] = "padded"
    hidden_size: int = 0  # shared: the model's
    window: float = math.inf  # shared: tokens that the attention with the shortest window reads

    def runs(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> list[list[int]]:
        """The sequences by index, those together that share their prompt: neighbours, where it
        saves time. Without sharing one each."""
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        # All layers get the same mask, so no sequence may be longer than the shortest window.
        shares = self.kind == "shared" and max(lengths) <= self.window
        runs: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            if shares and runs and prompt == prompts[index - 1]:
                before = sum(len(completions[other]) for other in runs[-1])
                if self._saves(len(prompt), before, len(completions[index])):
                    runs[-1].append(index)
                    continue
            runs.append([index])
        return runs

    def lengths(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[int]:
        """Tokens of each of `runs`."""
        return [
            len(prompts[run[0]]) + sum(len(completions[index]) for index in run)
            for run in self.runs(prompts, completions)
        ]

    def tokens(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> int:
        """Tokens of the sequences as a batch, padding included."""
        lengths = self.lengths(prompts, completions)
        return sum(lengths) if self.kind == "packed" else len(lengths) * max(lengths)

    def _saves(self, prompt: int, before: int, completion: int) -> bool:
        """Whether a completion of so many tokens costs less beside `before` tokens of others than
        with a prompt of its own.

        Attention computes what a completion and those before it would read of each other, too, to
        mask it. On a CPU all else that a token costs is about `hidden_size` pairs of query and key.
        """
        return 2 * before * completion <= prompt * (self.hidden_size + prompt)


PADDED = Layout()


@dataclass(frozen=True)
class Batch:
    """Prompts with completions in rows, and where each completion token is predicted."""

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, of a token in its own sequence
    rows: Tensor  # (N,) int64, the row of each completion token, in the order of the sequences
    columns: Tensor  # (N,) int64, the position whose hidden state predicts it
    targets: Tensor  # (N,) int64, the completion tokens
    # (B, 1, T, T) bool, True where a query reads a key. None: it reads all that precede it, which
    # never is the padding, since that comes last.
    mask: Tensor | None = None


def make_batch(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    pad_id: int,
    device: torch.device,
    layout: Layout = PADDED,
) -> Batch:
    """Tensors on `device` for prompts and their completions, as token ids.

    Positions that restart at 0 are how transformers' variable-length FlashAttention keeps packed
    sequences apart.
    """
    runs = [
        _Run(prompts[run[0]], [completions[index] for index in run])
        for run in layout.runs(prompts, completions)
    ]
    packed, lengths = layout.kind == "packed", [len(run.ids) for run in runs]
    height, width = (1, sum(lengths)) if packed else (len(runs), max(lengths))
    ids, parts = torch.full((height, width), pad_id), torch.full((height, width), -1)
    positions = torch.arange(width).repeat(height, 1)
    rows: list[int] = []
    columns: list[int] = []
    first = 0
    for number, run in enumerate(runs):
        row, end = 0 if packed else number, first + len(run.ids)
        ids[row, first:end] = torch.tensor(run.ids)
        positions[row, first:end] = torch.tensor(run.positions)
        parts[row, first:end] = torch.tensor(run.parts)
        rows += [row] * len(run.columns)
        columns += [first + column for column in run.columns]
        first = end if packed else 0
    mask = None
    if parts.max() > 1:
        positions[parts < 0] = 0  # a shared row may be longer than a model's table of positions
        mask = _mask(parts.to(device))
    targets = [*chain.from_iterable(completions)]
    indices = [torch.tensor(x, dtype=torch.long).to(device) for x in (rows, columns, targets)]
    return Batch(ids.to(device), positions.to(device), indices[0], indices[1], indices[2], mask)


class _Run:
    """A prompt and the completions that share it, one after the other.

    `parts`: 0 for the prompt's tokens, 1 for the first completion's, 2 for the second's ...
    `columns`: where each completion token is predicted; the prompt's last token predicts the first
    of every completion.
    """

    def __init__(self, prompt: list[int], completions: Sequence[list[int]]) -> None:
        size = len(prompt)
        self.ids, self.positions, self.parts = [*prompt], [*range(size)], [0] * size
        self.columns: list[int] = []
        for part, completion in enumerate(completions, 1):
            first = len(self.ids)
            self.columns += [size - 1, *range(first, first + len(completion) - 1)]
            self.ids += completion
            self.positions += range(size, size + len(completion))
            self.parts += [part] * len(completion)


def _mask(parts: Tensor) -> Tensor:
    """(B, 1, T, T): a token reads what precedes it of its own part and of the prompt, part 0."""
    own = parts[:, :, None] == parts[:, None, :]
    return (own | (parts == 0)[:, None, :]).tril()[:, None]
