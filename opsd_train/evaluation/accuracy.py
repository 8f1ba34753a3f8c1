"""Greedy accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd_train.reporting.intervals import paired_difference, wilson


@dataclass(frozen=True)
class Evaluation:
    """One greedy completion per problem and whether it is right."""

    completions: list[list[int]]
    correct: list[bool]
    reasons: list[str | None]
    """Why a check failed, which counts as wrong; None where it did not."""

    def summary(self) -> dict[str, object]:
        """Accuracy with its 95 % interval."""
        right, count = sum(self.correct), len(self.correct)
        return {
            "accuracy": right / count,
            "interval": list(wilson(right, count)),
            "correct": right,
            "problems": count,
        }

    def row(self) -> dict[str, object]:
        """For evaluations.jsonl: accuracy, its interval, and which problems were right (1) or
        wrong (0), in their order."""
        summary = self.summary()
        return {
            "accuracy": summary["accuracy"],
            "interval": summary["interval"],
            "correct": "".join(str(int(right)) for right in self.correct),
            "problems": len(self.correct),
            "failed_checks": sum(reason is not None for reason in self.reasons),
            "length": sum(map(len, self.completions)) / len(self.completions),
        }


def over_checkpoints(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of evaluations.jsonl say together, for the summary.

    `paired`: last against before training, if that was evaluated. As the paper reports (Appendix
    B), where more than one checkpoint was evaluated: `best`, the highest accuracy, chosen on the
    very problems it is measured on and so biased upwards; `mean`, the average. The model before
    training is not among them.
    """
    first, checkpoints = rows[0], [row for row in rows if row["step"] > 0]
    found: dict[str, Any] = {}
    if not checkpoints:
        return found
    last = checkpoints[-1]
    if first["step"] == 0 and first["problems"] == last["problems"]:  # a resumed run may ask fewer
        before, after = ([c == "1" for c in row["correct"]] for row in (first, last))
        found["paired"] = paired_difference(before, after)
    if len(checkpoints) > 1:
        best = max(checkpoints, key=lambda row: row["accuracy"])  # the first of equals
        found["best"] = {
            "step": best["step"],
            "accuracy": best["accuracy"],
            "interval": best["interval"],
            "correct": best["correct"].count("1"),
            "problems": best["problems"],
        }
        mean = sum(row["accuracy"] for row in checkpoints) / len(checkpoints)
        found["mean"] = {"accuracy": mean, "checkpoints": len(checkpoints)}
    return found
