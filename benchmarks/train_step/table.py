"""The terminal's table, from the JSON of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from benchmarks.train_step.registry import OURS

_NONE = "-"

FOOTNOTE = """\
Seconds are medians over the measured steps, of each row separately. TRL's forward passes include
the logits; ours end at the hidden states. Our loss includes the products with the head and the
gradient to the hidden states, which TRL computes in backward. Compare totals, or forward + loss +
backward. Rollouts are sampled, so losses also differ by their completions; the top-k loss is over
100 renormalised entries. Peak extra memory is the growth during a warm step, on a CPU
one that is not timed."""


def table(result: dict[str, Any]) -> str:
    """A row per phase, a column per contender; contenders that could not run are listed below."""
    ran = {n: c for n, c in result["contenders"].items() if "why_not" not in c}
    rows = [["", *ran], *_rows(ran)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    lines[1:1] = ["-" * len(lines[0])]
    absent = [f"{n}: {c['why_not']}" for n, c in result["contenders"].items() if n not in ran]
    return "\n".join([*lines, *absent, "", FOOTNOTE])


def _rows(ran: dict[str, dict[str, Any]]) -> list[list[str]]:
    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [title, *map(cell, ran.values())]

    ours = ran[OURS]
    phases = [row(f"{name}, s", partial(_phase, name)) for name in ours["phases"]]
    return [
        *phases,
        row("without rollout, s", lambda c: f"{_training(c):.2f}"),
        row("  / ours", lambda c: f"{_training(c) / _training(ours):.2f}"),
        row("total, s", lambda c: f"{median(c['seconds']):.2f}"),
        row("  / ours", lambda c: f"{median(c['seconds']) / median(ours['seconds']):.2f}"),
        row("peak extra memory, MiB", lambda c: _mib(c["peak_extra_mib"])),
        row("  / ours", lambda c: _ratio(c["peak_extra_mib"], ours["peak_extra_mib"])),
        row("peak memory, MiB", lambda c: _mib(c["peak_mib"])),
        row("loss tokens", lambda c: f"{c['loss_tokens']}"),
        row("loss, first measured step", lambda c: f"{c['loss'][0]:.4f}"),
    ]


def _phase(name: str, contender: dict[str, Any]) -> str:
    return f"{median(contender['phases'][name]):.2f}"


def _training(contender: dict[str, Any]) -> float:
    """Median seconds of a step outside its rollout."""
    rollouts = contender["phases"]["rollout"]
    pairs = zip(contender["seconds"], rollouts, strict=True)
    return median(seconds - rollout for seconds, rollout in pairs)


def _mib(value: float | None) -> str:
    return _NONE if value is None else f"{value:.0f}"


def _ratio(value: float | None, ours: float | None) -> str:
    return f"{value / ours:.2f}" if value and ours else _NONE
