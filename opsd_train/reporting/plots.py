"""The plots of report.html, drawn by matplotlib from the rows of metrics.jsonl."""

import base64
import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

STUDENT, TEACHER, NEUTRAL = "#2563eb", "#c2570c", "#64748b"
STYLE: Any = {
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
    """A plot on the page; `source` is a data URL."""

    title: str
    note: str
    source: str
    size: str = ""  # "", "wide" or "small"


@dataclass(frozen=True)
class Curves:
    """A plot of metrics over steps: (metric, label, colour) each."""

    title: str
    note: str
    metrics: tuple[tuple[str, str, str], ...]
    percent: bool = False
    from_zero: bool = True
    size: str = ""


def _one(metric: str) -> tuple[tuple[str, str, str], ...]:
    return ((metric, metric, STUDENT),)


LEARNING = (
    Curves("Loss", "Per optimizer step.", _one("loss")),
    Curves("Divergence", "Student to teacher, mean over the step's tokens.", _one("divergence")),
    Curves(
        "Log-probability", "Of the tokens trained on, under the trained model.", _one("logprob")
    ),
    Curves(
        "Entropy",
        "Mean over tokens, in nats.",
        (
            ("student_entropy", "student", STUDENT),
            ("entropy", "student", STUDENT),
            ("teacher_entropy", "teacher", TEACHER),
        ),
    ),
    Curves("Response length", "Mean tokens in a completion.", _one("completion_length")),
    Curves(
        "Cut off", "Share of completions that reached the token limit.", _one("truncated"), True
    ),
    Curves("Clipped mass", "Divergence removed by the clip, mean per token.", _one("clipped_mass")),
    Curves("Trained on", "Share of the samples that count in the loss.", _one("trained"), True),
    Curves(
        "Groups dropped",
        "Share of problems whose samples all got the same reward.",
        _one("groups_dropped"),
        True,
    ),
    Curves("Clip fraction", "Share of tokens whose ratio is clipped.", _one("clip_fraction"), True),
    Curves(
        "Probability ratio",
        "Policy to the policy before the updates; importance weight: trainer to sampler, capped.",
        (("ratio", "ratio", STUDENT), ("importance", "importance weight", TEACHER)),
        from_zero=False,
    ),
    Curves("KL from the initial policy", "Estimator k3, mean per token.", _one("kl")),
)
MACHINE = (
    Curves("Learning rate", "Of the step.", _one("lr"), size="small"),
    Curves("Gradient norm", "Before clipping.", _one("grad_norm"), size="small"),
    Curves("Tokens per second", "Of the rollout.", _one("tokens_per_second"), size="small"),
    Curves(
        "Sampler mismatch",
        "Mean |difference| of log-probabilities.",
        _one("sampler_mismatch"),
        size="small",
    ),
    Curves(
        "Sampler KL", "From sampler to trainer, estimator k3.", _one("sampler_kl"), size="small"
    ),
    Curves(
        "Sample age", "Optimizer updates since their weights.", _one("sample_age"), size="small"
    ),
    Curves("Peak memory", "MiB.", _one("peak_mib"), size="small"),
)


def figures(rows: Rows) -> list[Picture]:
    """The plots about learning, those with data."""
    with matplotlib.rc_context(STYLE):
        found = [_lines(curves, rows) for curves in LEARNING]
        found += [_by_position(rows, name) for name in ("divergence", "nll")]
    return [picture for picture in found if picture]


def machine_figures(rows: Rows) -> list[Picture]:
    """The small plots about the optimizer and the machine, those with data."""
    with matplotlib.rc_context(STYLE):
        found = [_lines(curves, rows) for curves in MACHINE]
    return [picture for picture in found if picture]


def _lines(curves: Curves, rows: Rows) -> Picture | None:
    figure, axes = new_axes(curves.size)
    axes.set_xlim(0, max((row["step"] for row in rows), default=1) + 1)
    drawn = []
    for name, label, color in curves.metrics:
        steps, values = series_of(rows, name)
        if not steps:
            continue
        drawn += values
        window = window_for(len(steps))
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.25, lw=1)
        smooth = smoothed(values, window)
        axes.plot(steps, smooth, color=color, label=label, marker=marker_for(steps))
    if not drawn:
        return None
    if curves.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(0, min(1, max(0.05, 1.1 * max(drawn))))
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
        if curves.from_zero and min(drawn) >= 0:
            axes.set_ylim(bottom=0)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="lower center" if curves.size else "best", ncols=2 if curves.size else 1)
    return to_picture(curves.title, curves.note, figure, curves.size)


_TITLES = {"divergence": "Divergence", "nll": "Negative log-likelihood"}


def _by_position(rows: Rows, value: str) -> Picture | None:
    name = f"{value}_by_position"
    rows = [row for row in rows if row.get(name)]
    if not rows:
        return None
    part = max(1, len(rows) // 4)
    figure, axes = new_axes(xlabel="position in the completion")
    parts = [(rows[-part:], STUDENT)]
    if len(rows) > 1:
        parts.insert(0, (rows[:part], NEUTRAL))
    for chosen, color in parts:
        positions, means = position_means(chosen, name)
        first, last = chosen[0]["step"], chosen[-1]["step"]
        label = f"step {first}" if first == last else f"steps {first} to {last}"
        axes.plot(positions, means, color=color, label=label, marker=marker_for(means))
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=0)
    axes.legend()
    return to_picture(f"{_TITLES[value]} by position", "Start and end of the run compared.", figure)


def position_means(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Positions and mean values over rows, in entries as wide as the widest of the rows."""
    widest = max(row.get("position_width", 1) for row in rows)
    columns = defaultdict(list)
    for row in rows:
        width = row.get("position_width", 1)
        for entry, value in enumerate(row[name]):
            if value is not None:
                columns[entry * width // widest].append(value)
    entries = sorted(columns)
    middles = [entry * widest + (widest + 1) / 2 for entry in entries]
    return middles, [sum(columns[entry]) / len(columns[entry]) for entry in entries]


SIZES = {"": (5.0, 2.7), "wide": (10.4, 3.6), "small": (3.3, 2.2)}


def new_axes(size: str = "", xlabel: str = "step") -> tuple[Figure, Axes]:
    """A figure of one of SIZES with whole numbers on its x axis."""
    figure = Figure(figsize=SIZES[size], layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, axes


def to_picture(title: str, note: str, figure: Figure, size: str = "") -> Picture:
    """The figure as an SVG image in a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    # An image, not inline: the ids of two inline SVGs in a page can clash.
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(title, note, f"data:image/svg+xml;base64,{data}", size)


def series_of(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, of the rows that have it."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def window_for(count: int) -> int:
    """Steps to smooth over: an odd number, about an eighth of the run; 1 for a short run."""
    return count // 16 * 2 + 1


def window_sizes(count: int, window: int) -> list[int]:
    """How many values `smoothed` averages at each place."""
    half = window // 2
    return [min(count, i + half + 1) - max(0, i - half) for i in range(count)]


def smoothed(values: list[float], window: int) -> list[float]:
    """Centered running mean; near the ends over fewer values."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def marker_for(points: list[Any]) -> str | None:
    """The marker of a curve: few points need one to be seen."""
    return "o" if len(points) < 8 else None
