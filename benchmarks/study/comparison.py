"""The numbers of an experiment: each arm's accuracies, and the differences between arms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.study.efficiency import Ratio, token_ratio
from benchmarks.study.outcomes import (
    BASE,
    Outcomes,
    Results,
    base_outcomes,
    finished,
    run_outcomes,
    sampling_outcomes,
)
from benchmarks.study.statistics import (
    Estimate,
    Measured,
    average,
    mean_curve,
    measure,
)

ACCURACY = "accuracy"


@dataclass
class ArmResult:
    """One arm on the experiment's tasks; tasks that were not run are missing."""

    name: str
    label: str
    changes: list[str]
    final: dict[str, Measured] = field(default_factory=dict)
    best: dict[str, Measured] = field(default_factory=dict)
    mean: dict[str, Measured] = field(default_factory=dict)
    passed: dict[str, list[Measured]] = field(default_factory=dict)  # by task: pass@1, pass@2, ...
    curves: dict[str, Outcomes] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)  # means over runs, see _cost
    finished: int = 0
    unfinished: list[str] = field(default_factory=list)
    unsampled: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Contrast:
    """First minus second; `total` is the average over the experiment's tasks, if all were run."""

    first: ArmResult
    second: ArmResult
    measure: str  # "accuracy" or "pass@k"
    tasks: dict[str, Estimate]
    total: Estimate | None
    paper: str | None  # which is ahead in the paper: "first" or "second"; None: it does not say
    ratios: dict[str, Ratio]


@dataclass(frozen=True)
class Comparison:
    """One experiment of results.json with its numbers."""

    name: str
    experiment: dict[str, Any]
    tasks: list[str]
    arms: list[ArmResult]
    contrasts: list[Contrast]

    def overall(self, values: dict[str, Measured]) -> Estimate | None:
        """Average over the experiment's tasks; None if one is missing."""
        if not self.tasks or any(task not in values for task in self.tasks):
            return None
        return average([values[task] for task in self.tasks]).estimate()


def compare(results: Results, experiment: dict[str, Any]) -> Comparison:
    """Compute all numbers of an experiment."""
    asked = {task for arm in experiment["arms"] for task in (arm.get("runs") or {})}
    tasks = [task for task in results["tasks"] if task in asked]
    arms = [_arm(results, experiment, arm, tasks) for arm in experiment["arms"]]
    named = {arm.name: arm for arm in arms}
    comparison = Comparison(experiment["name"], experiment, tasks, arms, [])
    for first, second in experiment["contrasts"]:
        pair = named[first], named[second]
        comparison.contrasts.append(_contrast(comparison, *pair, ACCURACY, lambda arm: arm.final))
        most = min((len(p) for arm in pair for p in arm.passed.values()), default=0)
        if most > 1:
            passed = partial(_passed, k=most)
            comparison.contrasts.append(_contrast(comparison, *pair, f"pass@{most}", passed))
    return comparison


def _arm(
    results: Results, experiment: dict[str, Any], arm: dict[str, Any], tasks: list[str]
) -> ArmResult:
    found = ArmResult(arm["name"], arm["label"], arm.get("changes") or [])
    for task in tasks:
        if arm["name"] == BASE:
            base = base_outcomes(results, experiment, task)
            if base:
                found.final[task] = measure(base)
        curve = run_outcomes(results, arm, task)
        if curve:
            found.curves[task] = curve
        trained = curve and curve.after_training()
        if trained and arm.get("read_at"):
            trained = trained.until(arm["read_at"])
        if trained:
            found.final[task] = measure(trained)
            found.best[task] = measure(trained.best())
            found.mean[task] = measure(trained.mean())
        sampled = sampling_outcomes(results, arm, task)
        if sampled:
            found.passed[task] = mean_curve(sampled)
    done, found.unfinished = _split(results, "runs", arm)
    _, found.unsampled = _split(results, "samplings", arm)
    found.finished, found.cost = len(done), _cost([results["runs"][run] for run in done])
    return found


def _split(results: Results, kind: str, arm: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Ids of the arm's finished runs or samplings, and of the others."""
    ids = [i for of_task in (arm.get(kind) or {}).values() for i in of_task]
    done = finished(results, kind, ids)
    return done, [i for i in ids if i not in done]


def _cost(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over runs: tokens generated, seconds, peak memory in MiB.

    Seconds exclude evaluations: one run evaluates the initial model for all.
    """
    if not runs:
        return {}
    seconds = [run["seconds"]["total"] - run["seconds"].get("evaluate", 0) for run in runs]
    return {
        "tokens": sum(run["tokens"] for run in runs) / len(runs),
        "seconds": sum(seconds) / len(runs),
        "memory": sum(run["peak_memory_mib"] or 0 for run in runs) / len(runs),
    }


def _passed(arm: ArmResult, k: int) -> dict[str, Measured]:
    return {task: values[k - 1] for task, values in arm.passed.items()}


def _contrast(
    comparison: Comparison,
    first: ArmResult,
    second: ArmResult,
    name: str,
    values: Callable[[ArmResult], dict[str, Measured]],
) -> Contrast:
    one, two = values(first), values(second)
    differences = {t: one[t] - two[t] for t in comparison.tasks if t in one and t in two}
    ratios = {}
    if comparison.experiment["kind"] == "tokens" and name == ACCURACY:
        pairs = {t: [arm.curves.get(t) for arm in (first, second)] for t in comparison.tasks}
        ratios = {
            t: token_ratio(*pair)
            for t, pair in pairs.items()
            if all(curve and curve.columns[0] == 0 for curve in pair)
        }
    return Contrast(
        first,
        second,
        name,
        {task: difference.estimate() for task, difference in differences.items()},
        comparison.overall(differences),
        _paper(comparison.experiment, first.name, second.name),
        ratios,
    )


def _paper(experiment: dict[str, Any], first: str, second: str) -> str | None:
    """Which of the two is ahead in the paper, by the experiment's pairs of (ahead, behind)."""
    claims = [tuple(pair) for pair in experiment.get("paper_ahead") or []]
    if (first, second) in claims:
        return "first"
    return "second" if (second, first) in claims else None
