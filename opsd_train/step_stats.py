"""Statistics of one optimizer step, gathered token by token over its micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opsd_train.batches import Sample

_TOP_TOKENS = 10


class StepStats:
    """Collects (N,) statistics per micro-batch; completions' tokens come in sample order."""

    def __init__(self) -> None:
        self.loss = 0.0
        self._columns: dict[str, list[Tensor]] = defaultdict(list)
        self._positions: list[int] = []
        self._tokens: list[int] = []
        self._samples: list[Sample] = []

    def add(self, samples: Sequence[Sample], loss: Tensor, stats: dict[str, Tensor]) -> None:
        """One micro-batch; its loss is already divided by the step's tokens."""
        self.loss += loss.item()
        for name, column in stats.items():
            self._columns[name].append(column.detach().float().cpu())
        for sample in samples:
            self._positions += range(len(sample.completion))
            self._tokens += sample.completion
            self._samples.append(sample)

    def mean(self, name: str) -> float | None:
        """Mean over the step's tokens; None where the objective does not give it."""
        return torch.cat(self._columns[name]).mean().item() if self._columns[name] else None

    def by_sample(self) -> list[tuple[Sample, float]]:
        """The samples, each with the mean divergence of its tokens."""
        parts = torch.cat(self._columns["divergence"]).split(
            [len(sample.completion) for sample in self._samples]
        )
        return [(s, p.mean().item()) for s, p in zip(self._samples, parts, strict=True)]

    def divergence_by_position(self) -> list[float]:
        """Mean divergence at each completion position."""
        return [total / count for total, count in self._grouped(self._positions).values()]

    def top_tokens(self, tokenizer: Any) -> list[tuple[str, float, int]]:
        """(text, mean divergence, count) of the tokens that diverge most."""
        groups = self._grouped(self._tokens)
        means = {token: (total / count, count) for token, (total, count) in groups.items()}
        top = sorted(means, key=lambda token: -means[token][0])[:_TOP_TOKENS]
        return [(tokenizer.decode([token]), *means[token]) for token in top]

    def _grouped(self, keys: list[int]) -> dict[int, tuple[float, int]]:
        """Sum and count of the divergence per key, keys ascending."""
        sums: dict[int, tuple[float, int]] = {}
        for key, value in zip(keys, torch.cat(self._columns["divergence"]).tolist(), strict=True):
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + value, count + 1)
        return dict(sorted(sums.items()))
