"""The accuracy plots of report.html: against steps, and against tokens generated."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from opsd_train.reporting.intervals import wilson
from opsd_train.reporting.plots import (
    NEUTRAL,
    STUDENT,
    STYLE,
    TEACHER,
    Picture,
    Rows,
    marker_for,
    new_axes,
    series_of,
    smoothed,
    to_picture,
    window_for,
    window_sizes,
)

INK = "#0f172a"


def accuracy_figures(
    rows: Rows, evaluations: Rows, summary: dict[str, Any], problems_per_step: int
) -> list[Picture]:
    """The accuracy plots with data; `evaluations` are the rows of evaluations.jsonl."""
    with matplotlib.rc_context(STYLE):
        found = [
            _against_steps(rows, evaluations, summary, problems_per_step),
            _against_tokens(evaluations, summary),
        ]
    return [picture for picture in found if picture]


def _against_steps(
    rows: Rows, evaluations: Rows, summary: dict[str, Any], batch: int
) -> Picture | None:
    steps, values = series_of(rows, "accuracy")
    if not steps and not evaluations:
        return None
    figure, axes = new_axes("wide")
    if steps:
        window = window_for(len(steps))
        smooth = smoothed(values, window)
        bounds = [
            wilson(mean * size * batch, size * batch)
            for mean, size in zip(smooth, window_sizes(len(values), window), strict=True)
        ]
        low, high = zip(*bounds, strict=True)
        axes.fill_between(steps, low, high, color=STUDENT, alpha=0.15, lw=0)
        mean_of = f"mean of {window} steps, " if window > 1 else ""
        label = f"rollouts on training problems, {mean_of}95% band"
        axes.plot(steps, smooth, color=STUDENT, label=label, marker=marker_for(steps))
    _heldout(axes, [row["step"] for row in evaluations], evaluations, summary)
    note = "Held-out: greedy. Rollouts: sampled. Bars and band: 95%, from the number of problems."
    return _finish("Accuracy", note, figure, axes, summary)


def _against_tokens(evaluations: Rows, summary: dict[str, Any]) -> Picture | None:
    tokens = [row.get("tokens") for row in evaluations]
    if None in tokens or len(set(tokens)) < 2:  # nothing was generated for training
        return None
    figure, axes = new_axes("wide", "tokens generated for training")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _heldout(axes, tokens, evaluations, summary)
    note = "The held-out accuracies above, against the tokens generated for training by then."
    return _finish("Accuracy against generated tokens", note, figure, axes, summary)


def _heldout(axes: Axes, x: list[Any], evaluations: Rows, summary: dict[str, Any]) -> None:
    means = [row["accuracy"] for row in evaluations]
    bounds = [row["interval"] for row in evaluations]
    reach = [
        [max(mean - low, 0) for mean, (low, _) in zip(means, bounds, strict=True)],
        [max(high - mean, 0) for mean, (_, high) in zip(means, bounds, strict=True)],
    ]
    if evaluations:
        axes.errorbar(
            x,
            means,
            reach,
            fmt="D-",
            lw=1,
            ms=5,
            capsize=3,
            color=INK,
            label="held-out problems",
            zorder=4,
            clip_on=False,
        )
    best = (summary.get("best") or {}).get("step")
    for place, row in zip(x, evaluations, strict=True):
        if row["step"] == best:
            label = "best, chosen on these problems"
            axes.plot(place, row["accuracy"], "o", ms=13, mfc="none", color=INK, label=label)


def _finish(title: str, note: str, figure: Figure, axes: Axes, summary: dict[str, Any]) -> Picture:
    lines = (("teacher", TEACHER, "--", "teacher"), ("majority", NEUTRAL, ":", "majority answer"))
    for name, color, style, label in lines:
        if summary.get(name):
            level = summary[name]["accuracy"]
            axes.axhline(level, color=color, ls=style, label=f"held-out, {label}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=8)
    return to_picture(title, note, figure, "wide")
