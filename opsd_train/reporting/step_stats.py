"""Per-token statistics of one optimizer step, over its micro-batches and ranks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_train.data.batches import Sample
from opsd_train.reporting.sample_table import token_pieces

# The methods' statistics whose means are logged, and the metrics' names.
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
    "forward_kl": "forward_kl_share",
}
TOP_TOKENS = 10
MAX_POSITIONS = 256  # entries of a mean by position


class StepStats:
    """Collects the (N,) statistics of each micro-batch, its tokens in the order of its samples.

    A token's value is its divergence, or for methods without one its negative log-likelihood (nll).
    A statistic that is NaN is not known for its token, and no mean counts it.
    """

    def __init__(self) -> None:
        self.loss = 0.0
        self._columns: dict[str, list[Tensor]] = defaultdict(list)
        self._samples: list[Sample] = []
        self._unscored: list[Sample] = []

    def add(self, samples: Sequence[Sample], loss: Tensor, stats: dict[str, Tensor]) -> None:
        """Add a micro-batch; its loss is already divided by the step's number of tokens."""
        self.loss += loss.item()
        for name, column in stats.items():
            self._columns[name].append(column.detach().double().cpu())
        self._samples += samples

    def add_unscored(self, samples: Sequence[Sample]) -> None:
        """Add samples that are not trained on; they appear in the sample table only."""
        self._unscored += samples

    def set_verdicts(self, samples: Sequence[Sample]) -> None:
        """Copy the verdicts of these samples to the same samples added earlier without them."""
        known = {_identity(sample): sample for sample in samples}
        for added in (self._samples, self._unscored):
            for index, sample in enumerate(added):
                graded = known[_identity(sample)]
                added[index] = replace(
                    sample,
                    correct=graded.correct,
                    answer=graded.answer,
                    check_failed=graded.check_failed,
                )

    def merge(self, others: Sequence[StepStats]) -> None:
        """Add the statistics of other ranks; means are then over all tokens of all ranks."""
        for other in others:
            self.loss += other.loss
            for name, columns in other._columns.items():
                self._columns[name] += columns
            self._samples += other._samples
            self._unscored += other._unscored

    def row(self, tokenizer: Any) -> dict[str, Any]:
        """The metrics of the step's tokens; those that the method does not give are left out."""
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
        """Mean of a statistic over the step's tokens; None if it is known for none."""
        column = self._column(name)
        if column is None or column.isnan().all():
            return None
        return column.nanmean().item()

    def known(self, name: str) -> int:
        """The tokens whose value of a statistic is known."""
        column = self._column(name)
        return 0 if column is None else int((~column.isnan()).sum())

    @property
    def value_name(self) -> str | None:
        """What a token's value is: "divergence" or "nll"; None before anything was added."""
        if self._columns.get("divergence"):
            return "divergence"
        return "nll" if self._logprobs() is not None else None

    def by_position(self) -> tuple[int, list[float | None]]:
        """Mean value by position in the completion: positions per entry (a power of 2), entries.

        An entry without a known value is None.
        """
        lengths = [len(sample.completion) for sample in self._samples]
        width = 1
        while max(lengths) > width * MAX_POSITIONS:
            width *= 2
        entries = torch.cat([torch.arange(length) for length in lengths]) // width
        return width, _means(entries, self._values())

    def top_tokens(self, tokenizer: Any) -> list[tuple[str, float, int]]:
        """(text, mean value, count) of the tokens with the largest mean value."""
        tokens = torch.tensor([token for sample in self._samples for token in sample.completion])
        known = ~self._values().isnan()
        tokens, values = tokens[known], self._values()[known]
        ids, indices, counts = tokens.unique(return_inverse=True, return_counts=True)
        means = torch.bincount(indices, values) / counts
        top = means.sort(descending=True, stable=True).indices[:TOP_TOKENS].tolist()
        return [(tokenizer.decode([ids[i].item()]), means[i].item(), counts[i].item()) for i in top]

    def mismatch(self) -> dict[str, float]:
        """Difference between the sampler's and the trainer's log-probabilities of the tokens.

        `sampler_mismatch` is the mean absolute difference; `sampler_kl` estimates
        KL(sampler || trainer) by k3, the mean of r - 1 - log r with r = trainer / sampler.
        Empty if no sample has the sampler's log-probabilities.
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
        change = change[~change.isnan()]
        return {
            "sampler_mismatch": change.abs().mean().item(),
            "sampler_kl": (change.expm1() - change).mean().item(),
        }

    def sample_rows(self, tokenizer: Any, count: int) -> list[dict[str, Any]]:
        """Rows of the sample table: `count` completions, of different problems if possible."""
        scored = [(sample, values.tolist()) for sample, values in self._values_by_sample()]
        unscored = [(sample, None) for sample in sorted(self._unscored, key=_identity)]
        # By identity: with several updates per rollout a sample was added once for each.
        distinct = {_identity(sample): (sample, values) for sample, values in unscored + scored}
        seen: Counter[str] = Counter()
        ranked = []  # the first sample of each problem, then the second ones, ...
        for sample, values in distinct.values():
            ranked.append((seen[sample.problem.id], sample, values))
            seen[sample.problem.id] += 1
        ranked.sort(key=lambda entry: entry[0])
        return [self._sample_row(tokenizer, sample, values) for _, sample, values in ranked[:count]]

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
        if sample.context is not None:
            row["teacher_sees"] = ", ".join(sample.context) or "nothing"
            row["teacher_prompt"] = tokenizer.decode(sample.teacher_prompt)
        if values and self.value_name:
            known = [value for value in values if not math.isnan(value)]
            row[self.value_name] = sum(known) / len(known) if known else None
            row["tokens"] = token_pieces(tokenizer, sample.completion, values)
        return row

    def _column(self, name: str) -> Tensor | None:
        return torch.cat(self._columns[name]) if self._columns.get(name) else None

    def _logprobs(self) -> Tensor | None:
        """The trainer's log-probabilities of the completion tokens."""
        own = self._column("logprob")
        return self._column("student_logprob") if own is None else own

    def _values(self) -> Tensor:
        """(N,) values of all tokens; `value_name` says which."""
        divergence = self._column("divergence")
        if divergence is not None:
            return divergence
        logprobs = self._logprobs()
        assert logprobs is not None
        return -logprobs

    def _split(self, column: Tensor) -> tuple[Tensor, ...]:
        return column.split([len(sample.completion) for sample in self._samples])

    def _values_by_sample(self) -> list[tuple[Sample, Tensor]]:
        if not self._samples:
            return []
        pairs = zip(self._samples, self._split(self._values()), strict=True)
        return sorted(pairs, key=lambda pair: _identity(pair[0]))


def _means(entries: Tensor, values: Tensor) -> list[float | None]:
    """The mean of the (N,) values with each entry number, those that are not NaN."""
    known, size = ~values.isnan(), int(entries.max()) + 1
    sums = torch.bincount(entries[known], values[known], minlength=size)
    counts = torch.bincount(entries[known], minlength=size)
    return [s / n if n else None for s, n in zip(sums.tolist(), counts.tolist(), strict=True)]


def _identity(sample: Sample) -> tuple[str, tuple[int, ...]]:
    return sample.problem.id, tuple(sample.completion)
