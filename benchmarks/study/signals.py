"""Signals of collapse in a long run: what the monitor would have said, and the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opsd_train.config.schema import CollapseConfig
from opsd_train.reporting.collapse import MONITORED, TRAINED, CollapseMonitor
from opsd_train.reporting.metrics_log import read_rows

LONG = "long"
"""How the names of arms with long runs begin."""
CURVES = ("completion_length", "student_entropy", "divergence", "clipped_mass", "truncated")
WIDTH = 10  # steps to a point of a curve


def signals(run_folder: Path) -> dict[str, Any]:
    """From metrics.jsonl, as JSON.

    "first": the step at which each monitored metric first leaves its band, and to which side, as
    [step, side]; metrics that stay are left out. "curves": means over WIDTH steps.
    """
    rows = read_rows(run_folder / "metrics.jsonl")
    monitor, first = CollapseMonitor(CollapseConfig()), {}
    for row in rows:
        for warning in monitor.observe(row["step"], row):
            name = next(n for n in (*MONITORED, TRAINED) if f": {n} is " in warning)
            side = "above" if " above the band " in warning else "below"
            first.setdefault(name, [row["step"], side])
    return {"first": first, "curves": {n: c for n in CURVES if (c := _curve(rows, n))}}


def _curve(rows: list[dict[str, Any]], name: str) -> list[float]:
    parts = [rows[start : start + WIDTH] for start in range(0, len(rows), WIDTH)]
    values = [[row[name] for row in part if row.get(name) is not None] for part in parts]
    return [round(sum(v) / len(v), 5) for v in values] if all(values) else []
