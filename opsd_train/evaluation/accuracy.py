"""Greedy accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd_train.reporting.intervals import paired_difference, wilson


@dataclass(frozen=True)
class Evaluation:
    """One greedy completion of each problem, and whether its answer is right."""

    completions: list[list[int]]
    """Token ids."""
    correct: list[bool]
    reasons: list[str | None]
    """Why an answer could not be checked, which counts as wrong; None where it was checked."""

    def summary(self) -> dict[str, object]:
        """Accuracy with its 95 % Wilson interval."""
        right, count = sum(self.correct), len(self.correct)
        return {
            "accuracy": right / count,
            "interval": list(wilson(right, count)),
            "correct": right,
            "problems": count,
        }

    def row(self) -> dict[str, object]:
        """A line of evaluations.jsonl.

        "correct" has a 1 or a 0 for each problem, in their order; "failed_checks" counts the
        answers that could not be checked; "length" is the mean number of tokens.
        """
        summary = self.summary()
        return {
            "accuracy": summary["accuracy"],
            "interval": summary["interval"],
            "correct": "".join(str(int(right)) for right in self.correct),
            "problems": len(self.correct),
            "failed_checks": sum(reason is not None for reason in self.reasons),
            "length": sum(map(len, self.completions)) / len(self.completions),
        }


def as_summary(row: dict[str, Any]) -> dict[str, Any]:
    """A line of evaluations.jsonl in the form of `Evaluation.summary`."""
    return {
        "accuracy": row["accuracy"],
        "interval": row["interval"],
        "correct": row["correct"].count("1"),
        "problems": row["problems"],
    }


def before_and(row: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """`paired` of this row and that before training, where both are on the same problems."""
    if first is None or first["step"] != 0 or first["problems"] != row["problems"]:
        return {}
    before, after = ([c == "1" for c in r["correct"]] for r in (first, row))
    return {"paired": paired_difference(before, after)}


def over_checkpoints(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the summary says about all rows of an evaluations.jsonl.

    paired   accuracy of the last checkpoint minus that before training, where both were evaluated
    best     the checkpoint with the highest accuracy (the paper's Appendix B); it is chosen on the
             problems it is measured on, so its accuracy is biased upwards
    mean     mean accuracy of the checkpoints

    `best` and `mean` need two checkpoints; the model before training is not one of them.
    """
    first, checkpoints = rows[0], [row for row in rows if row["step"] > 0]
    found: dict[str, Any] = {}
    if not checkpoints:
        return found
    last = checkpoints[-1]
    found |= before_and(last, first)  # a resumed run may ask fewer problems
    if len(checkpoints) > 1:
        best = max(checkpoints, key=lambda row: row["accuracy"])  # the first of equals
        found["best"] = {"step": best["step"], **as_summary(best)}
        mean = sum(row["accuracy"] for row in checkpoints) / len(checkpoints)
        found["mean"] = {"accuracy": mean, "checkpoints": len(checkpoints)}
    return found
