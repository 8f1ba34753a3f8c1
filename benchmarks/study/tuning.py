"""Each method's learning rate and steps, chosen from runs of the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.study.outcomes import Results
from benchmarks.study.reading import NONE, percent

KIND = "tuning"
_PREFIX = "tune-"


@dataclass(frozen=True)
class Choice:
    """The setting of a method with the highest held-out accuracy; see `chosen`."""

    method: str  # the arm's name in the other experiments
    rate: str  # as its recipe writes it
    steps: int
    accuracy: float


def chosen(results: Results) -> list[Choice]:
    """One for each method whose runs are all there: of equals the fewer steps, then the lower rate.

    Empty for a study without a tuning.
    """
    choices = []
    for method, arms in _methods(results).items():
        found = [
            Choice(method, _rate(arm), row["step"], row["accuracy"])
            for arm in arms
            for row in _evaluations(results, arm)
            if row["step"] in _may_be_chosen(results)
        ]
        if found and all(_evaluations(results, arm) for arm in arms):
            key = lambda c: (-c.accuracy, c.steps, float(c.rate))  # noqa: E731
            choices.append(min(found, key=key))
    return choices


def tuning_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Methods by rates: accuracy at each of the evaluated steps, and what was chosen."""
    picked = {choice.method: choice for choice in chosen(results)}
    table: list[list[str]] = []
    rates: list[str] = []
    methods = _methods(results)
    for method, arms in methods.items():
        rates = [_rate(arm) for arm in arms]
        cells = [
            " / ".join(percent(row["accuracy"]) for row in _evaluations(results, arm)) or NONE
            for arm in arms
        ]
        choice = picked.get(method)
        last = f"{choice.rate}, {choice.steps} steps" if choice else NONE
        table.append([arms[0]["label"].rpartition(", ")[0], *cells, last])
    runs = [_evaluations(results, arm) for arms in methods.values() for arm in arms]
    steps = {row["step"] for rows in runs for row in rows}
    after = " / ".join(map(str, sorted(steps)))
    return [f"percent, after {after} steps", *rates, "chosen"], table


def _may_be_chosen(results: Results) -> list[int]:
    """The steps that the rest of the study's runs have."""
    (tuning,) = (e for e in results["experiments"] if e["kind"] == KIND)
    return tuning["read"]


def _methods(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The arms of the tuning by method."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for experiment in results["experiments"]:
        for arm in experiment["arms"] if experiment["kind"] == KIND else ():
            if arm["name"].startswith(_PREFIX):
                method = arm["name"].removeprefix(_PREFIX).rpartition("-")[0]
                methods.setdefault(method, []).append(arm)
    return methods


def _rate(arm: dict[str, Any]) -> str:
    (word,) = (change for change in arm["changes"] if change.startswith("optim.lr="))
    return word.partition("=")[2]


def _evaluations(results: Results, arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the arm's one run after training began; none if it is not finished."""
    ((name,),) = arm["runs"].values()
    run = results["runs"].get(name) or {}
    if run.get("status") != "finished":
        return []
    return [row for row in run["evaluations"] if row["step"] > 0]
