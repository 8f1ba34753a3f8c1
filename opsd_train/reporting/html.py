"""report.html: one self-contained page about a run, finished or not."""

import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2

from opsd_train.config.errors import UserError
from opsd_train.config.load import load_recipe
from opsd_train.reporting.accuracy_plots import accuracy_figures
from opsd_train.reporting.metrics_log import duration, read_rows, replace_file
from opsd_train.reporting.plots import figures, machine_figures
from opsd_train.reporting.sample_table import REPLACEMENT, Rows, largest

RESULTS = (
    ("before", "Student before"),
    ("after", "Student after"),
    ("teacher", "Teacher's prompt (shows the solution), before"),
)
PHASES = ("rollout", "grading", "teacher", "student", "optimizer")
MAX_TOKENS = 10
# Limits that keep the page of a long run small; samples.jsonl has everything.
MAX_SAMPLE_STEPS = 12
FIRST_PIECES, LAST_PIECES = 1200, 400  # of a completion's tokens
SHADES = 8  # of a token's background, by its value

Card = tuple[str, str, str]  # label, value, remark


def write_report(run_dir: str | Path) -> Path:
    """Write a run folder's report.html from the files there; returns its path.

    Raises UserError if the folder is not a run folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {run_dir}")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir} is not a run folder: it has no {name}")
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = load_recipe(str(run_dir / "config.yaml"))
    rows = read_rows(run_dir / "metrics.jsonl")
    if any("surprise_by_position" in row for row in rows):
        raise UserError(
            f"{run_dir} is of version 0.1: its metric surprise_by_position is nll_by_position "
            "since 0.2; write its report with that version"
        )
    evaluations = read_rows(run_dir / "evaluations.jsonl")
    samples = _sample_steps(read_rows(run_dir / "samples.jsonl"))
    scale = _shade_scale(samples)
    summary_file = run_dir / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else {}

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters["shaded"] = functools.partial(_shaded, scale=scale or 1.0)
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        headline=_headline(config),
        config_text=config_text,
        summary=summary,
        results=[(label, summary[key]) for key, label in RESULTS if summary.get(key)],
        cards=_cards(rows, summary, config),
        warnings=[warning for row in rows for warning in row.get("warnings") or []],
        figures=accuracy_figures(rows, evaluations, summary, config["problems_per_step"])
        + figures(rows),
        machine=machine_figures(rows),
        value_name=_value_name(rows),
        tokens=_top_tokens(rows),
        phases=_phases(rows, summary),
        samples=samples,
        scale=scale,
        shades=SHADES,
    )
    target = run_dir / "report.html"
    replace_file(target, page)
    return target


def _headline(config: dict[str, Any]) -> str:
    """The run in one line: method with its main settings, model, data."""
    method = config.get("method", "opsd")
    section = config.get(method) or {}
    details: list[str] = []
    if method in ("opsd", "distill"):
        details.append((config.get("loss") or {}).get("objective", "full_vocabulary"))
    if "teacher" in section:
        details.append(f"teacher {section['teacher']}")
    samples = (config.get("rollout") or {}).get("samples_per_prompt", 1)
    if samples > 1:
        details.append(f"{samples} samples per problem")
    data = config["data"]
    source = data.get("task") if data["source"] == "reasoning_gym" else data.get("path")
    described = f"{method} ({', '.join(details)})" if details else method
    trained = "LoRA" if config.get("lora") else "all weights"
    return f"{described}, {config['model']['name_or_path']} ({trained}), {source}"


def _cards(rows: Rows, summary: dict[str, Any], config: dict[str, Any]) -> list[Card]:
    """The cards below the results."""
    cards = _accuracy_cards(summary)
    before, after = summary.get("divergence_before"), summary.get("divergence_after")
    if before is not None and after is not None:
        cards.append(("Divergence", f"{before:.4f} → {after:.4f}", "per token, before → after"))
    if rows:
        cards.append(("Steps", f"{rows[-1]['step']} of {config['steps']}", ""))
        tokens = rows[-1].get("tokens")
        if tokens:
            cards.append(("Tokens generated", f"{tokens:,}", "in training"))
    if summary.get("peak_memory_mib") is not None:
        cards.append(("Peak memory", f"{summary['peak_memory_mib']:,.0f} MiB", ""))
    total = (summary.get("seconds") or {}).get("total")
    if total is not None:
        cards.append(("Time", duration(total), "with loading and evaluation"))
    return cards


def _accuracy_cards(summary: dict[str, Any]) -> list[Card]:
    cards = []
    if paired := summary.get("paired"):
        low, high = (100 * bound for bound in paired["interval"])
        counts = f"{paired['gained']} gained, {paired['lost']} lost"
        gain = f"{100 * paired['difference']:+.1f} points"
        cards.append(("Accuracy, gain", gain, f"95% {low:+.1f} to {high:+.1f}; {counts}"))
    if best := summary.get("best"):
        mean = summary["mean"]
        low, high = (100 * bound for bound in best["interval"])
        chosen = "chosen on these problems, so biased upwards"
        remark = f"step {best['step']}, 95% {low:.1f} to {high:.1f}; {chosen}"
        cards.append(("Best checkpoint", f"{best['accuracy']:.1%}", remark))
        over = f"over {mean['checkpoints']} checkpoints"
        cards.append(("Mean of checkpoints", f"{mean['accuracy']:.1%}", over))
    return cards


def _phases(rows: Rows, summary: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Time by phase: (phase, seconds, text)."""
    seconds = dict(summary.get("seconds") or {})
    for phase in PHASES:
        # The larger of summary and rows: an interrupted run may have no summary.
        spent = sum(row.get(f"seconds_{phase}") or 0 for row in rows)
        seconds[phase] = max(seconds.get(phase, 0), spent)
    total = seconds.pop("total", 0)
    known = sum(seconds.values())
    if total > known:
        seconds["other"] = total - known
    whole = max(total, known)
    return [
        (phase, spent, f"{duration(spent)}, {spent / whole:.0%}")
        for phase, spent in seconds.items()
        if spent > 0
    ]


def _top_tokens(rows: Rows) -> list[tuple[str, float, int]]:
    """Tokens with the largest mean value over the run: (shown text, mean, count)."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        for text, mean, count in row.get("top_tokens") or []:
            if mean is not None:
                sums[text] += mean * count
                counts[text] += count
    frequent = [text for text in counts if counts[text] >= 3] or list(counts)
    ranked = sorted(frequent, key=lambda text: sums[text] / counts[text], reverse=True)
    return [
        (visible(text), sums[text] / counts[text], counts[text]) for text in ranked[:MAX_TOKENS]
    ]


def visible(token: str) -> str:
    """A token's text with visible symbols for spaces, line ends and tabs."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(empty)"


def _value_name(rows: Rows) -> str:
    return "nll" if any("nll_by_position" in row for row in rows) else "divergence"


def _sample_steps(rows: Rows) -> list[tuple[int, Rows]]:
    """Samples by step, latest first; of many steps the first, the last and some in between."""
    steps = defaultdict(list)
    for row in rows:
        steps[row["step"]].append(row)
    latest = sorted(steps, reverse=True)
    if len(latest) > MAX_SAMPLE_STEPS:
        stride = (len(latest) - 1) / (MAX_SAMPLE_STEPS - 1)
        latest = [latest[round(stride * i)] for i in range(MAX_SAMPLE_STEPS)]
    return [(step, steps[step]) for step in latest]


def _shade_scale(samples: list[tuple[int, Rows]]) -> float | None:
    """The value of the darkest shade, the 98th percentile of the page's tokens; None: no tokens."""
    tokens = [piece for _, rows in samples for row in rows for piece in row.get("tokens") or []]
    values = sorted(value for _, value in tokens if value is not None)
    return max(values[int(0.98 * (len(values) - 1))], 1e-4) if values else None


def _shaded(pieces: list[list[Any]], scale: float) -> list[tuple[str, int, bool, str]]:
    """The pieces of a completion: (text, shade, whether among the largest, value as text)."""
    marked, shown = largest(pieces), []
    for index, (text, value) in enumerate(pieces):
        known = value is not None
        shade = min(max(round(SHADES * value / scale), 0), SHADES) if known else 0
        # A line end has no width: show a symbol.
        text = text.replace("\n", "⏎\n") if index in marked and not text.strip() else text
        text = "".join(c if c.isprintable() or c in "\n\t" else REPLACEMENT for c in text)
        shown.append((text, shade, index in marked, f"{value:.4f}" if known else ""))
    left_out = len(shown) - FIRST_PIECES - LAST_PIECES
    if left_out > 0:
        gap = f" … {left_out:,} tokens left out … "
        shown[FIRST_PIECES:-LAST_PIECES] = [(gap, 0, False, "")]
    return shown
