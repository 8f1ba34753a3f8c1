"""Statistics of one optimizer step, gathered token by token over its micro-batches and ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_train.data.batches import Sample
from opsd_train.reporting.sample_table import token_pieces

# Columns of the methods whose means are logged, and the names they are logged under.
MEANS = {
    "divergence": "divergence",
    "student_entropy": "student_entropy",
    "teacher_entropy": "teacher_entropy",
    "clipped_mass": "clipped_mass",
    "logprob": "logprob",
    "entropy": "entropy",
    "ratio": "ratio",
    "clipped": "clip_fraction",
    "kl": "kl",
    "importance": "importance",
}
TOP_TOKENS = 10
MOST_POSITIONS = 256


class StepStats:
    """Collects (N,) statistics per micro-batch; completions' tokens come in sample order.

    The value of a token is its divergence where the method has one, else its negative
    log-likelihood, -log p.
    """

    def __init__(self) -> None:
        self.loss = 0.0
        self._columns: dict[str, list[Tensor]] = defaultdict(list)
        self._samples: list[Sample] = []
        self._unscored: list[Sample] = []

    def add(self, samples: Sequence[Sample], loss: Tensor, stats: dict[str, Tensor]) -> None:
        """One micro-batch; its loss is already divided by the step's tokens."""
        self.loss += loss.item()
        for name, column in stats.items():
            self._columns[name].append(column.detach().double().cpu())
        self._samples += samples

    def add_unscored(self, samples: Sequence[Sample]) -> None:
        """Samples that went through no forward pass; they are only shown."""
        self._unscored += samples

    def judge(self, samples: Sequence[Sample]) -> None:
        """Takes over the verdicts of these samples, which came after they were added."""
        known = {_identity(sample): sample for sample in samples}
        for added in (self._samples, self._unscored):
            for index, sample in enumerate(added):
                judged = known[_identity(sample)]
                verdict = {n: getattr(judged, n) for n in ("correct", "answer", "check_failed")}
                added[index] = replace(sample, **verdict)

    def merge(self, others: Sequence[StepStats]) -> None:
        """Take in the statistics of other ranks; means are over all tokens of all ranks."""
        for other in others:
            self.loss += other.loss
            for name, columns in other._columns.items():
                self._columns[name] += columns
            self._samples += other._samples
            self._unscored += other._unscored

    def row(self, tokenizer: Any) -> dict[str, Any]:
        """What a metrics row says about the step's tokens; what the method lacks is left out."""
        row: dict[str, Any] = {metric: self.mean(column) for column, metric in MEANS.items()}
        name = self.value_name
        if name:
            width, means = self.by_position()
            row[f"{name}_by_position"] = means
            row["position_width"] = width
            row["top_tokens"] = self.top_tokens(tokenizer)
        row |= self.mismatch()
        return {key: value for key, value in row.items() if value is not None}

    def mean(self, name: str) -> float | None:
        """Mean of a column over the step's tokens; None where the method does not give it."""
        column = self._column(name)
        return None if column is None else column.mean().item()

    @property
    def value_name(self) -> str | None:
        """What a token's value is: "divergence", "nll", or None before any statistics."""
        if self._columns.get("divergence"):
            return "divergence"
        return "nll" if self._logprobs() is not None else None

    def by_position(self) -> tuple[int, list[float]]:
        """Mean value along the completion: positions per entry (a power of 2), and the entries."""
        lengths = [len(sample.completion) for sample in self._samples]
        width = 1
        while max(lengths) > width * MOST_POSITIONS:
            width *= 2
        entries = torch.cat([torch.arange(length) for length in lengths]) // width
        sums = torch.bincount(entries, self._values())
        return width, (sums / torch.bincount(entries)).tolist()

    def top_tokens(self, tokenizer: Any) -> list[tuple[str, float, int]]:
        """(text, mean value, count) of the tokens whose mean is largest."""
        tokens = torch.tensor([token for sample in self._samples for token in sample.completion])
        kinds, places, counts = tokens.unique(return_inverse=True, return_counts=True)
        means = torch.bincount(places, self._values()) / counts
        top = means.sort(descending=True, stable=True).indices[:TOP_TOKENS].tolist()
        return [
            (tokenizer.decode([kinds[i].item()]), means[i].item(), counts[i].item()) for i in top
        ]

    def mismatch(self) -> dict[str, float]:
        """How far the sampler's log-probs are from the trainer's, where samples carry them.

        `sampler_kl` estimates KL(sampler || trainer) by k3: r - 1 - log r, r = trainer / sampler.
        """
        trainer = self._logprobs()
        if trainer is None:
            return {}
        changes = [
            own - torch.tensor(sample.logprobs, dtype=torch.double)
            for sample, own in zip(self._samples, self._split(trainer), strict=True)
            if sample.logprobs is not None
        ]
        if not changes:
            return {}
        change = torch.cat(changes)
        return {
            "sampler_mismatch": change.abs().mean().item(),
            "sampler_kl": (change.expm1() - change).mean().item(),
        }

    def sample_rows(self, tokenizer: Any, count: int) -> list[dict[str, Any]]:
        """Rows of the sample table: `count` completions, of different problems where it can be."""
        scored = [(sample, values.tolist()) for sample, values in self._values_by_sample()]
        unscored = [(sample, None) for sample in sorted(self._unscored, key=_identity)]
        # By identity: a sample is there again for each update on one rollout.
        distinct = {_identity(sample): (sample, values) for sample, values in unscored + scored}
        seen: Counter[str] = Counter()
        turns = []
        for sample, values in distinct.values():
            turns.append((seen[sample.problem.id], sample, values))
            seen[sample.problem.id] += 1
        turns.sort(key=lambda turn: turn[0])
        return [self._sample_row(tokenizer, sample, values) for _, sample, values in turns[:count]]

    def _sample_row(
        self, tokenizer: Any, sample: Sample, values: list[float] | None
    ) -> dict[str, Any]:
        text = tokenizer.decode(sample.completion, skip_special_tokens=True)
        row = {
            "problem": sample.problem.id,
            "question": sample.problem.question,
            "answer": sample.problem.answer,
            "completion": text,
            "extracted": sample.answer,
            "correct": sample.correct,
            "trained": sample.weight > 0,
        }
        if values and self.value_name:
            row[self.value_name] = sum(values) / len(values)
            row["tokens"] = token_pieces(tokenizer, sample.completion, values)
        return row

    def _column(self, name: str) -> Tensor | None:
        return torch.cat(self._columns[name]) if self._columns.get(name) else None

    def _logprobs(self) -> Tensor | None:
        """The trainer's log-probabilities of the completion tokens."""
        own = self._column("logprob")
        return self._column("student_logprob") if own is None else own

    def _values(self) -> Tensor:
        divergence = self._column("divergence")
        return -self._logprobs() if divergence is None else divergence

    def _split(self, column: Tensor) -> tuple[Tensor, ...]:
        return column.split([len(sample.completion) for sample in self._samples])

    def _values_by_sample(self) -> list[tuple[Sample, Tensor]]:
        if not self._samples:
            return []
        pairs = zip(self._samples, self._split(self._values()), strict=True)
        return sorted(pairs, key=lambda pair: _identity(pair[0]))


def _identity(sample: Sample) -> tuple[str, tuple[int, ...]]:
    return sample.problem.id, tuple(sample.completion)
