"""Long runs that may collapse: which signal came first, and the curves."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.study.comparison import ArmResult, Comparison
from benchmarks.study.outcomes import Results
from benchmarks.study.reading import NONE, percent, share_text
from benchmarks.study.signals import WIDTH
from benchmarks.study.statistics import mean_curve
from opsd_train.reporting.plots import Picture, to_picture

SIGNALS = {
    "completion_length": "length",
    "student_entropy": "entropy",
    "divergence": "divergence",
    "clipped_mass": "clipped mass",
    "trained": "nothing trained",
}
ARROWS = {"below": "↓", "above": "↑"}


def signals_table(results: Results, comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Arms by their highest and last accuracy, and the step of each signal, seed by seed."""
    rows = []
    for arm in comparison.arms:
        runs = _runs(results, arm)
        if not runs:
            continue
        cells = [_first(runs, name) for name in SIGNALS]
        rows.append([arm.label, _peak(comparison, arm), share_text(_last(comparison, arm)), *cells])
    header = ["", "highest mean accuracy (of those shown: biased upwards)", "after the last step"]
    return [*header, *(f"{name}, first warning" for name in SIGNALS.values())], rows


def curves(results: Results, comparison: Comparison, colors: dict[str, str], look: Any) -> Picture:
    """Accuracy, length, entropy and divergence over the steps, means over seeds, arm by arm."""
    names = ("accuracy", "completion_length", "student_entropy", "divergence")
    titles = ("held-out accuracy", "length of samples, tokens", "student's entropy", "divergence")
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(10.4, 6.2), layout="constrained")
        panels = figure.subplots(2, 2)
        for name, title, axes in zip(names, titles, panels.flat, strict=True):
            for arm in comparison.arms:
                x, y = _points(results, comparison, arm, name)
                if len(x):
                    axes.plot(x, y, color=colors[arm.name], label=arm.label)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
        panels.flat[0].yaxis.set_major_formatter(PercentFormatter(1, 0))
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        note = f"Means over seeds. Length, entropy and divergence: {WIDTH} steps a point."
        return to_picture("Long runs", note, figure, "wide")


def _points(
    results: Results, comparison: Comparison, arm: ArmResult, name: str
) -> tuple[np.ndarray, np.ndarray]:
    if name == "accuracy":
        curve = arm.curves.get(comparison.tasks[0])
        if curve is None:
            return np.array([]), np.array([])
        return np.array(curve.columns), np.array([m.value for m in mean_curve(curve)])
    found = [run["signals"]["curves"].get(name) for run in _runs(results, arm)]
    found = [values for values in found if values]
    if not found:
        return np.array([]), np.array([])
    means = np.mean([values[: min(map(len, found))] for values in found], 0)
    return WIDTH * (np.arange(len(means)) + 0.5), means


def _runs(results: Results, arm: ArmResult) -> list[dict[str, Any]]:
    """The arm's finished runs that have signals."""
    runs = [run for run in results["runs"].values() if run["arm"] == arm.name]
    return [run for run in runs if run.get("signals")]


def _first(runs: list[dict[str, Any]], name: str) -> str:
    found = [run["signals"]["first"].get(name) for run in runs]
    if not any(found):
        return NONE
    return ", ".join(f"{one[0]} {ARROWS[one[1]]}" if one else NONE for one in found)


def _peak(comparison: Comparison, arm: ArmResult) -> str:
    curve = arm.curves.get(comparison.tasks[0])
    if curve is None:
        return NONE
    means = [measured.value for measured in mean_curve(curve)]
    best = int(np.argmax(means))
    return f"{percent(means[best])} (step {curve.columns[best]})"


def _last(comparison: Comparison, arm: ArmResult) -> Any:
    return comparison.overall(arm.final)
