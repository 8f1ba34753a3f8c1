"""The plots of report.html, drawn with matplotlib from the rows of metrics.jsonl."""

import base64
import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from opsd_train.evaluation.intervals import wilson

STUDENT, TEACHER, NEUTRAL = "#2563eb", "#c2570c", "#64748b"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#475569",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "svg.hashsalt": "opsd",
}

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A plot as the page shows it; `source` is a data URL."""

    title: str
    note: str
    source: str
    wide: bool = False


def figures(rows: Rows, summary: dict[str, Any], problems_per_step: int) -> list[Picture]:
    """The plots of a run that there is data for."""
    with matplotlib.rc_context(STYLE):
        found = _draw(rows, summary, problems_per_step)
    return [picture for picture in found if picture]


def _draw(rows: Rows, summary: dict[str, Any], batch: int) -> list[Picture | None]:
    entropies = (("student_entropy", "student", STUDENT), ("teacher_entropy", "teacher", TEACHER))
    return [
        _accuracy(rows, summary, batch),
        _lines("Loss", "Per optimizer step.", rows, [("loss", "loss", STUDENT)], floor=None),
        _lines(
            "Divergence",
            "Student to teacher, mean over the tokens of the step.",
            rows,
            [("divergence", "divergence", STUDENT)],
        ),
        _lines("Entropy", "Mean over tokens, in nats.", rows, entropies),
        _lines(
            "Response length",
            "Mean tokens in a completion.",
            rows,
            [("completion_length", "tokens", STUDENT)],
        ),
        _lines(
            "Cut off",
            "Share of completions that reached the token limit.",
            rows,
            [("truncated", "share", STUDENT)],
            percent=True,
        ),
        _by_position(rows),
        _lines(
            "Clipped mass",
            "Divergence removed by the clip, mean per token.",
            rows,
            [("clipped_mass", "mass", STUDENT)],
        ),
    ]


def _accuracy(rows: Rows, summary: dict[str, Any], batch: int) -> Picture | None:
    steps, values = _series(rows, "accuracy")
    if not steps and not summary.get("before"):
        return None
    figure, axes = _axes(wide=True)
    if steps:
        window = _window(len(steps))
        smooth = _smooth(values, window)
        bounds = [
            wilson(mean * size * batch, size * batch)
            for mean, size in zip(smooth, _window_sizes(len(values), window), strict=True)
        ]
        axes.fill_between(steps, *zip(*bounds, strict=True), color=STUDENT, alpha=0.15, lw=0)
        mean_of = f"mean of {window} steps, " if window > 1 else ""
        label = f"rollouts on training problems, {mean_of}95% band"
        axes.plot(steps, smooth, color=STUDENT, label=label, marker=_marker(steps))
    last = steps[-1] if steps else 1
    for key, step, face in (("before", 0, "white"), ("after", last, STUDENT)):
        result = summary.get(key)
        if result:
            low, high = result["interval"]
            mean = result["accuracy"]
            errors = [[max(mean - low, 0)], [max(high - mean, 0)]]
            axes.errorbar(
                [step],
                [mean],
                errors,
                fmt="D",
                ms=6,
                capsize=4,
                color="#0f172a",
                mfc=face,
                label=f"held-out, {key}",
                zorder=4,
                clip_on=False,
            )
    if summary.get("teacher"):
        mean = summary["teacher"]["accuracy"]
        axes.axhline(mean, color=TEACHER, ls="--", label="held-out, teacher")
    if summary.get("majority"):
        mean = summary["majority"]["accuracy"]
        axes.axhline(mean, color=NEUTRAL, ls=":", label="held-out, majority answer")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=8)
    note = "Held-out problems are answered greedily; rollouts are sampled. Bars and band are 95%."
    return _picture("Accuracy", note, figure, wide=True)


def _lines(
    title: str,
    note: str,
    rows: Rows,
    names: Any,
    floor: float | None = 0.0,
    percent: bool = False,
) -> Picture | None:
    figure, axes = _axes()
    axes.set_xlim(0, max((row["step"] for row in rows), default=1) + 1)
    drawn = 0
    for name, label, color in names:
        steps, values = _series(rows, name)
        if not steps:
            continue
        drawn += 1
        window = _window(len(steps))
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.25, lw=1)
        smooth = _smooth(values, window)
        axes.plot(steps, smooth, color=color, label=label, marker=_marker(steps))
    if not drawn:
        return None
    if floor is not None:
        axes.set_ylim(bottom=floor, top=1.0 if percent else None)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if drawn > 1:
        axes.legend()
    return _picture(title, note, figure)


def _by_position(rows: Rows) -> Picture | None:
    rows = [row for row in rows if row.get("divergence_by_position")]
    if not rows:
        return None
    part = max(1, len(rows) // 4)
    figure, axes = _axes(xlabel="position in the completion")
    parts = [(rows[-part:], STUDENT)]
    if len(rows) > 1:
        parts.insert(0, (rows[:part], NEUTRAL))
    for chosen, color in parts:
        columns = defaultdict(list)
        for row in chosen:
            for position, value in enumerate(row["divergence_by_position"], 1):
                if value is not None:
                    columns[position].append(value)
        means = [sum(values) / len(values) for values in columns.values()]
        first, last = chosen[0]["step"], chosen[-1]["step"]
        label = f"step {first}" if first == last else f"steps {first} to {last}"
        axes.plot(list(columns), means, color=color, label=label, marker=_marker(means))
    axes.set_ylim(bottom=0)
    axes.legend()
    return _picture("Divergence by position", "Start and end of the run compared.", figure)


def _axes(xlabel: str = "step", wide: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10.4, 3.6) if wide else (5.0, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, axes


def _picture(title: str, note: str, figure: Figure, wide: bool = False) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    # As an image, not inline: the ids of two SVGs in one page may clash.
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(title, note, f"data:image/svg+xml;base64,{data}", wide)


def _series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _window(count: int) -> int:
    """Steps to smooth over: an odd number, about an eighth of the run; 1 for a short one."""
    return count // 16 * 2 + 1


def _window_sizes(count: int, window: int) -> list[int]:
    half = window // 2
    return [min(count, i + half + 1) - max(0, i - half) for i in range(count)]


def _smooth(values: list[float], window: int) -> list[float]:
    """Centred running mean; near the ends over the values that are there."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _marker(points: list[Any]) -> str | None:
    # A line through one or two points shows nothing without them.
    return "o" if len(points) < 8 else None
