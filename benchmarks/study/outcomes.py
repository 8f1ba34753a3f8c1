"""results.json as arrays: which held-out problems each run solves at each evaluation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opsd_train.config.errors import UserError
from opsd_train.evaluation.scores import pass_at

Results = dict[str, Any]
BASE = "base"


@dataclass(frozen=True)
class Outcomes:
    """Results of an arm's finished runs, or samplings, on the held-out problems of a task."""

    task: str
    ids: tuple[str, ...]  # of the runs, one per seed
    columns: tuple[int, ...]  # the evaluations' steps; for samplings the k of pass@k
    values: np.ndarray  # (seeds, columns, problems): 1 if correct, else 0; for samplings pass@k
    tokens: np.ndarray  # (seeds, columns): generated in training up to then

    def after_training(self) -> Outcomes | None:
        """Without the evaluation before the first step; None if there is no other."""
        chosen = [i for i, step in enumerate(self.columns) if step > 0]
        if not chosen:
            return None
        return self._only(chosen)

    def until(self, step: int) -> Outcomes:
        """Without the evaluations after this step."""
        return self._only([i for i, column in enumerate(self.columns) if column <= step])

    def _only(self, chosen: Sequence[int]) -> Outcomes:
        steps = tuple(self.columns[i] for i in chosen)
        values, tokens = self.values[:, chosen], self.tokens[:, chosen]
        return Outcomes(self.task, self.ids, steps, values, tokens)

    def best(self) -> Outcomes:
        """One column: each run's best evaluation, chosen on the held-out problems themselves."""
        index = self.values.mean(2).argmax(1)[:, None]
        values = np.take_along_axis(self.values, index[:, :, None], 1)
        tokens = np.take_along_axis(self.tokens, index, 1)
        return Outcomes(self.task, self.ids, self.columns[-1:], values, tokens)

    def mean(self) -> Outcomes:
        """One column: the mean over the evaluations."""
        values, tokens = self.values.mean(1, keepdims=True), self.tokens[:, -1:]
        return Outcomes(self.task, self.ids, self.columns[-1:], values, tokens)


def load_results(folder: Path) -> Results:
    """Read results.json of a study's folder. Raises UserError if it is missing or not JSON."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a study's folder: it has no results.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def finished(results: Results, kind: str, ids: Sequence[str]) -> list[str]:
    """The `ids` that finished; `kind` is "runs" or "samplings"."""
    known = results[kind]
    return [i for i in ids if i in known and known[i]["status"] == "finished"]


def run_outcomes(results: Results, arm: dict[str, Any], task: str) -> Outcomes | None:
    """All evaluations of an arm's finished runs on a task; None if there are none.

    Raises UserError if two runs were evaluated on different numbers of problems.
    """
    if not arm.get("runs"):
        return None
    ids = finished(results, "runs", arm["runs"].get(task, []))
    rows = {run: {row["step"]: row for row in results["runs"][run]["evaluations"]} for run in ids}
    ids = [run for run in ids if rows[run]]
    if not ids:
        return None
    steps = sorted(set.intersection(*(set(rows[run]) for run in ids)))
    return _outcomes(task, ids, steps, [[rows[run][step] for step in steps] for run in ids])


def base_outcomes(results: Results, experiment: dict[str, Any], task: str) -> Outcomes | None:
    """The model before training: the evaluation at step 0 that most runs have in common.

    Runs with other prompts have another one.
    """
    ids = [run for arm in experiment["arms"] for run in (arm.get("runs") or {}).get(task, [])]
    rows = [
        results["runs"][run]["evaluations"][0]
        for run in dict.fromkeys(ids)
        if (results["runs"].get(run) or {}).get("evaluations")
    ]
    rows = [row for row in rows if row["step"] == 0]
    if not rows:
        return None
    most = Counter(row["correct"] for row in rows).most_common(1)[0][0]
    row = next(row for row in rows if row["correct"] == most)
    return _outcomes(task, [BASE], [0], [[row]])


def sampling_outcomes(results: Results, arm: dict[str, Any], task: str) -> Outcomes | None:
    """pass@k of an arm's finished samplings, k = 1 to the number of samples all of them have."""
    ids = finished(results, "samplings", (arm.get("samplings") or {}).get(task, []))
    found = [results["samplings"][i] for i in ids]
    if not found:
        return None
    _same_problems(task, ids, [len(sampling["correct"]) for sampling in found])
    ks = range(1, min(sampling["scores"]["samples"] for sampling in found) + 1)
    values = [
        [[pass_at(s["scores"]["samples"], right, k) for right in s["correct"]] for k in ks]
        for s in found
    ]
    tokens = np.zeros((len(ids), len(ks)))
    return Outcomes(task, tuple(ids), tuple(ks), np.array(values), tokens)


def _outcomes(
    task: str, ids: Sequence[str], steps: Sequence[int], rows: list[list[dict[str, Any]]]
) -> Outcomes:
    _same_problems(task, ids, [len(row["correct"]) for of_run in rows for row in of_run])
    values = np.array([[[c == "1" for c in row["correct"]] for row in of_run] for of_run in rows])
    tokens = np.array([[row["tokens"] for row in of_run] for of_run in rows], dtype=float)
    return Outcomes(task, tuple(ids), tuple(steps), values.astype(float), tokens)


def _same_problems(task: str, ids: Sequence[str], counts: list[int]) -> None:
    if len(set(counts)) > 1:
        raise UserError(
            f"results.json: the evaluations of {', '.join(ids)} on {task} are on "
            f"{min(counts)} to {max(counts)} problems; they must be on the same ones"
        )
