"""report.html: one self-contained page about a run, finished or not."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2

from opsd_train.config import load_recipe
from opsd_train.errors import UserError
from opsd_train.metrics import duration
from opsd_train.plots import Rows, figures

RESULTS = (
    ("before", "Student before"),
    ("after", "Student after"),
    ("teacher", "Teacher (sees the solution), before"),
)
PHASES = ("rollout", "teacher", "student", "optimizer")
MOST_TOKENS = 15


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html into a run folder from the files there, and returns its path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {run_dir}")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir} is not a run folder: it has no {name}")
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = load_recipe(str(run_dir / "config.yaml"))
    rows = _read_rows(run_dir / "metrics.jsonl")
    summary_file = run_dir / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else {}

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        config=config,
        config_text=config_text,
        summary=summary,
        results=[(label, summary[key]) for key, label in RESULTS if summary.get(key)],
        facts=_facts(rows, summary, config),
        figures=figures(rows, summary, config["problems_per_step"]),
        tokens=_top_tokens(rows),
        phases=_phases(rows, summary),
        samples=_samples_by_step(_read_rows(run_dir / "samples.jsonl")),
    )
    target = run_dir / "report.html"
    partial = target.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def _read_rows(path: Path) -> Rows:
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            # A killed run may leave half a line, but only at the very end.
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not valid JSON") from None
    return rows


def _facts(rows: Rows, summary: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cards under the result: (label, value, remark)."""
    facts = []
    paired = summary.get("paired")
    if paired:
        low, high = (100 * bound for bound in paired["interval"])
        facts.append(
            (
                "Accuracy, gain",
                f"{100 * paired['difference']:+.1f} points",
                f"95% {low:+.1f} to {high:+.1f}; {paired['gained']} gained, {paired['lost']} lost",
            )
        )
    before, after = summary.get("divergence_before"), summary.get("divergence_after")
    if before is not None and after is not None:
        facts.append(("Divergence", f"{before:.4f} → {after:.4f}", "per token, before → after"))
    if rows:
        facts.append(("Steps", f"{rows[-1]['step']} of {config['steps']}", ""))
        tokens = rows[-1].get("tokens")
        if tokens is not None:
            facts.append(("Tokens generated", f"{tokens:,}", "in training"))
    if summary.get("peak_memory_mib") is not None:
        facts.append(("Peak memory", f"{summary['peak_memory_mib']:,.0f} MiB", ""))
    total = (summary.get("seconds") or {}).get("total")
    if total is not None:
        facts.append(("Time", duration(total), "with loading and evaluation"))
    return facts


def _phases(rows: Rows, summary: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Where the time went: (phase, seconds, text)."""
    seconds = dict(summary.get("seconds") or {})
    for phase in PHASES:
        spent = sum(row.get(f"seconds_{phase}") or 0 for row in rows)
        seconds.setdefault(phase, spent)
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
    """Tokens with the largest divergence over the run: (shown text, mean, count)."""
    sums, counts = defaultdict(float), defaultdict(int)
    for row in rows:
        for text, mean, count in row.get("top_tokens") or []:
            if mean is not None:
                sums[text] += mean * count
                counts[text] += count
    often = [text for text in counts if counts[text] >= 3] or list(counts)
    ranked = sorted(often, key=lambda text: sums[text] / counts[text], reverse=True)
    return [
        (_visible(text), sums[text] / counts[text], counts[text]) for text in ranked[:MOST_TOKENS]
    ]


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(empty)"


def _samples_by_step(rows: Rows) -> list[tuple[int, Rows]]:
    steps = defaultdict(list)
    for row in rows:
        steps[row["step"]].append(row)
    return sorted(steps.items(), reverse=True)
