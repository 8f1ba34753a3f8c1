"""The metrics of a step that its samples decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_train.data.batches import Sample
from opsd_train.data.contexts import context_metrics


def generated_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of the completions that were generated, and graded."""
    return sum(len(sample.completion) for sample in samples if sample.correct is not None)


def sample_metrics(samples: Sequence[Sample]) -> dict[str, Any]:
    """Verdicts, lengths and what the teacher sees, from the step's samples of all ranks."""
    row: dict[str, Any] = {}
    verdicts = [sample.correct for sample in samples if sample.correct is not None]
    if verdicts:
        row = {
            "accuracy": sum(verdicts) / len(verdicts),
            "failed_checks": sum(sample.check_failed is not None for sample in samples),
            "truncated": sum(not sample.finished for sample in samples) / len(samples),
        }
    return row | {
        "completion_length": sum(len(s.completion) for s in samples) / len(samples),
        "trained": sum(sample.weight > 0 for sample in samples) / len(samples),
        **context_metrics(samples),
    }
