"""The plots of the study's page, drawn by matplotlib in the style of report.html."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from benchmarks.study.comparison import ACCURACY, Comparison, Contrast
from benchmarks.study.long_runs import curves
from benchmarks.study.outcomes import BASE, Results
from benchmarks.study.reading import MINUS, points
from benchmarks.study.statistics import Estimate, Measured, average, mean_curve
from benchmarks.study.tuning import KIND
from opsd_train.reporting.plots import NEUTRAL, STUDENT, STYLE, TEACHER, Picture, to_picture

WIDTH, PANEL_HEIGHT = 10.4, 2.9
OWN = "opsd"  # the arm that every experiment compares with
COLORS = ("#c2570c", "#15803d", "#7e22ce", "#be123c", "#0e7490", "#334155", "#eab308")
INK = "#0f172a"
AVERAGE = "average"
# Letters as text, not as outlines, for a quarter of the file size.
LOOK = STYLE | {"svg.fonttype": "none"}


def experiment_figures(results: Results, comparison: Comparison) -> list[Picture]:
    """The plots of one experiment, those with numbers."""
    if comparison.experiment["kind"] == "memory":
        return _drawn([memory(results["memory"]) if results.get("memory") else None])
    if comparison.experiment["kind"] == "tokens":
        return _drawn([token_curves(comparison)])
    if comparison.experiment["kind"] == KIND:
        return []
    found = [accuracies(results, comparison), differences(comparison)]
    if comparison.experiment["kind"] == "collapse" and any(a.curves for a in comparison.arms):
        colors = {arm.name: color for arm, color in _colored(comparison)}
        found.insert(0, curves(results, comparison, colors, LOOK))
    if comparison.experiment["kind"] == "passk":
        found.insert(1, pass_at_k_curves(comparison))
    return _drawn(found)


def accuracies(results: Results, comparison: Comparison) -> Picture | None:
    """Held-out accuracy of each arm with its interval, a panel per task and one for their mean."""
    arms = [arm for arm in comparison.arms if arm.final]
    if not arms:
        return None
    with matplotlib.rc_context(LOOK):
        names = _with_average(comparison)
        figure, panels = _forest(names, [arm.label for arm in arms])
        for name, axes in zip(names, panels, strict=True):
            for row, arm in enumerate(arms):
                whole = name == AVERAGE
                shown = comparison.overall(arm.final) if whole else _estimate(arm.final.get(name))
                color = {OWN: STUDENT, BASE: INK}.get(arm.name, NEUTRAL)
                _interval(axes, row, shown, color, hollow=arm.name == BASE)
            majority = (results["tasks"].get(name) or {}).get("majority")
            if majority:
                axes.axvline(majority["accuracy"], color=NEUTRAL, ls=":", lw=1)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
            axes.margins(x=0.08)
        note = (
            "Held-out problems, greedy; mean over seeds, 95 % interval over problems and seeds. "
            "Dotted: always the most frequent answer."
        )
        return to_picture("Accuracy after training", note, figure, "wide")


def differences(comparison: Comparison) -> Picture | None:
    """Every contrast with its interval, a panel per task and one for their mean."""
    contrasts = [contrast for contrast in comparison.contrasts if contrast.tasks]
    if not contrasts:
        return None
    with matplotlib.rc_context(LOOK):
        names = _with_average(comparison)
        labels = [_contrast_label(contrast) for contrast in contrasts]
        figure, panels = _forest(names, labels, 0.37)
        for name, axes in zip(names, panels, strict=True):
            axes.axvline(0, color=INK, lw=1)
            for row, contrast in enumerate(contrasts):
                shown = contrast.total if name == AVERAGE else contrast.tasks.get(name)
                _interval(axes, row, shown, _side_color(shown))
            axes.xaxis.set_major_formatter(lambda x, _: points(x).removesuffix(".0"))
        for axes in panels:  # the same scale for all panels
            axes.set_xlim(*_common_limits(panels))
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        note = (
            "Points, first minus second, on the same problems; 95 % interval. Grey: it includes 0."
        )
        return to_picture("Differences", note, figure, "wide")


def token_curves(comparison: Comparison) -> Picture | None:
    """Accuracy against tokens generated in training, a panel per task."""
    tasks = [t for t in comparison.tasks if any(t in arm.curves for arm in comparison.arms)]
    if not tasks:
        return None
    with matplotlib.rc_context(LOOK):
        figure, panels = _panels(tasks)
        for task, axes in zip(tasks, panels, strict=True):
            for arm, color in _colored(comparison):
                curve = arm.curves.get(task)
                if curve is None:
                    continue
                tokens, means = curve.tokens.mean(0), mean_curve(curve)
                if curve.columns[0] == 0:
                    axes.axhline(means[0].value, color=NEUTRAL, ls="--", lw=1)
                later = tokens > 0
                _band(axes, tokens[later], np.array(means, dtype=object)[later], color, arm.label)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("tokens generated in training")
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        _legend(figure, panels)
        note = "Held-out, greedy, mean over seeds with its 95 % band. Dashed: before training."
        return to_picture("Accuracy against tokens generated", note, figure, "wide")


def pass_at_k_curves(comparison: Comparison) -> Picture | None:
    """pass@k of each arm, a panel per task and one for their mean."""
    if not any(arm.passed for arm in comparison.arms):
        return None
    with matplotlib.rc_context(LOOK):
        names = _with_average(comparison)
        figure, panels = _panels(names)
        for name, axes in zip(names, panels, strict=True):
            for arm, color in _colored(comparison):
                if name != AVERAGE:
                    curve = arm.passed.get(name, [])
                elif all(task in arm.passed for task in comparison.tasks):
                    parts = [arm.passed[task] for task in comparison.tasks]
                    curve = [average(at_k) for at_k in zip(*parts, strict=False)]
                else:
                    curve = []
                if curve:
                    _band(axes, range(1, len(curve) + 1), curve, color, arm.label)
            most = max((len(p) for arm in comparison.arms for p in arm.passed.values()), default=1)
            axes.set_xscale("log", base=2)
            ticks = [2**i for i in range(most.bit_length())]
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda k, _: f"{k:.0f}")
            axes.set_xlabel("k")
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        _legend(figure, panels)
        note = "Unbiased estimate from the samples of each problem, with its 95 % band."
        return to_picture("pass@k", note, figure, "wide")


def memory(measured: dict[str, Any]) -> Picture:
    """Peak memory of a step over its tokens; hollow and dashed where it is predicted."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.add_subplot()
        methods = (("plain", TEACHER, "plain logits"), ("ours", STUDENT, "opsd_kernels"))
        for method, color, label in methods:
            points = [p for p in measured["points"] if p["method"] == method]
            points.sort(key=lambda point: point["tokens"])
            for predicted, style in ((False, "-"), (True, "--")):
                shown = [p for p in points if p["predicted"] == predicted]
                if not shown:
                    continue
                last = [p for p in points if not p["predicted"]][-1:] if predicted else []
                line = [*last, *shown]  # the dashed line starts where the solid one ends
                x, y = [p["tokens"] for p in line], [p["mib"] / 1024 for p in line]
                axes.plot(x, y, color=color, ls=style)
                x, y = [p["tokens"] for p in shown], [p["mib"] / 1024 for p in shown]
                axes.plot(
                    x,
                    y,
                    ls="",
                    marker="o",
                    color=color,
                    mfc="white" if predicted else color,
                    label=f"{label}, {'predicted' if predicted else 'measured'}",
                )
        if measured.get("machine_mib"):
            size = measured["machine_mib"] / 1024
            axes.axhline(size, color=INK, ls=":", label=f"the machine's memory, {size:.1f} GiB")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        axes.set_xlabel("tokens of the step")
        axes.set_ylabel("GiB")
        axes.set_ylim(bottom=0)
        axes.legend()
        return to_picture("Peak memory of a step", measured["note"], figure, "wide")


def positions(found: dict[str, list[dict[str, Any]]]) -> Picture | None:
    """Divergence by position at the start and the end of runs; task -> their diagnostics."""
    found = {task: diagnostics for task, diagnostics in found.items() if diagnostics}
    if not found:
        return None
    with matplotlib.rc_context(LOOK):
        figure, panels = _panels(list(found))
        for (_, diagnostics), axes in zip(found.items(), panels, strict=True):
            for part, color in (("start", NEUTRAL), ("end", STUDENT)):
                for seed, one in enumerate(diagnostics):
                    curve = one["position"][part]
                    first, last = curve["steps"]
                    label = f"steps {first} to {last}" if seed == 0 else None
                    axes.plot(curve["positions"], curve["means"], color=color, lw=1.2, label=label)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("position in the completion")
            axes.legend(fontsize=8)
        note = (
            "Mean over the tokens at a position, in nats; a line a seed, start and end of the run."
        )
        return to_picture("Divergence by position", note, figure, "wide")


def _drawn(found: Sequence[Picture | None]) -> list[Picture]:
    return [picture for picture in found if picture]


def _with_average(comparison: Comparison) -> list[str]:
    return [*comparison.tasks, AVERAGE] if len(comparison.tasks) > 1 else list(comparison.tasks)


def _panels(names: Sequence[str], height: float = PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = list(figure.subplots(1, len(names), squeeze=False)[0])
    for name, axes in zip(names, panels, strict=True):
        axes.set_title(name, fontsize=9, loc="left", color=INK)
    return figure, panels


def _forest(
    names: Sequence[str], labels: Sequence[str], row_height: float = 0.27
) -> tuple[Figure, list[Axes]]:
    """Panels with a row per label, the first on top; only the first panel shows the labels."""
    figure, panels = _panels(names, 0.75 + row_height * len(labels))
    for index, axes in enumerate(panels):
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), labels if index == 0 else [""] * len(labels))
        axes.grid(False, axis="y")
    return figure, panels


def _common_limits(panels: Sequence[Axes]) -> tuple[float, float]:
    low = min(axes.dataLim.x0 for axes in panels)
    high = max(axes.dataLim.x1 for axes in panels)
    room = 0.06 * (high - low)
    return low - room, high + room


def _interval(
    axes: Axes, row: int, shown: Estimate | None, color: str, *, hollow: bool = False
) -> None:
    if shown is None:
        return
    axes.plot([shown.low, shown.high], [row, row], color=color, lw=1.8, solid_capstyle="round")
    axes.plot([shown.value], [row], "o", ms=6, color=color, mfc="white" if hollow else color)


def _band(
    axes: Axes, x: Sequence[float], curve: Sequence[Measured], color: str, label: str
) -> None:
    shown = [measured.estimate() for measured in curve]
    low, high = [e.low for e in shown], [e.high for e in shown]
    axes.fill_between(x, low, high, color=color, alpha=0.14, lw=0)
    axes.plot(x, [e.value for e in shown], color=color, marker="o", ms=3.5, lw=1.6, label=label)


def _colored(comparison: Comparison) -> list[tuple[Any, str]]:
    others = iter(COLORS * (1 + len(comparison.arms) // len(COLORS)))
    fixed = {OWN: STUDENT, BASE: NEUTRAL}
    return [(arm, fixed.get(arm.name) or next(others)) for arm in comparison.arms]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=min(5, len(entries))
    )


def _estimate(measured: Measured | None) -> Estimate | None:
    return measured.estimate() if measured else None


def _side_color(shown: Estimate | None) -> str:
    if shown is None or shown.low <= 0 <= shown.high:
        return NEUTRAL
    return STUDENT if shown.low > 0 else TEACHER


def _contrast_label(contrast: Contrast) -> str:
    extra = "" if contrast.measure == ACCURACY else f", {contrast.measure}"
    return f"{contrast.first.label}\n{MINUS} {contrast.second.label}{extra}"
