"""Greedy accuracy on held-out problems."""

from __future__ import annotations

from dataclasses import dataclass

from opsd_train.evaluation.intervals import wilson


@dataclass(frozen=True)
class Evaluation:
    """One greedy completion per problem and whether it is right."""

    completions: list[list[int]]
    correct: list[bool]

    def summary(self) -> dict[str, object]:
        """Accuracy with its 95 % interval."""
        right, count = sum(self.correct), len(self.correct)
        return {
            "accuracy": right / count,
            "interval": list(wilson(right, count)),
            "correct": right,
            "problems": count,
        }
