"""Tables for the terminal, one per case: times in milliseconds and relative to the floor's."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.report.tables import GRADIENT_LIMIT, LOSS_LIMIT


def render(record: dict[str, Any]) -> str:
    """All cases of a record, with its environment and the skipped cases."""
    env = record["environment"]
    versions = ", ".join(f"{name} {found}" for name, found in env["versions"].items() if found)
    lines = [
        f"{env['device']}, {env['cores']} cores, {env['threads']} threads; {versions}; "
        f"commit {(env['commit'] or 'unknown')[:12]}",
        f"memory: {record['memory_method']}",
        "",
    ]
    for case in record["cases"]:
        lines += [*_case(case), ""]
    lines += [f"skipped {entry['id']}: {entry['why']}" for entry in record["skipped"]]
    lines += [
        f"!: the loss is off by more than {LOSS_LIMIT:.0%} or a gradient by {GRADIENT_LIMIT:.0%}",
        "",
    ]
    return "\n".join(lines)


def _case(case: dict[str, Any]) -> list[str]:
    contenders = case["contenders"]
    medians = {
        name: {part: statistics.median(values) for part, values in c["seconds"].items()}
        for name, c in contenders.items()
        if "seconds" in c
    }
    phase = "forward" if case["head"] == "no_grad" else "both"
    floor = next(medians[n][phase] for n, c in contenders.items() if c["role"] == "floor")
    peers = [medians[n][phase] for n in medians if contenders[n]["role"] == "peer"]
    best = min(peers, default=None)
    width = max(map(len, contenders))
    head = (
        f"{'ms':<{width}}  forward backward     both  x floor x best peer  peak MiB"
        "     loss   grad h   grad W"
    )
    rows = [
        f"{case['id']}: {case['title']}, {case['gemms']} products, {case['rounds']} rounds",
        head,
    ]
    for name, c in contenders.items():
        if name not in medians:
            rows.append(f"{name:<{width}}  {c['why_not']}")
            continue
        parts = (medians[name].get(part) for part in ("forward", "backward", "both"))
        ms = " ".join(f"{'-':>8}" if part is None else f"{1000 * part:8.1f}" for part in parts)
        whole = medians[name][phase]
        against = f"{whole / best:11.2f}" if best else " " * 11
        ratio = f"{whole / floor:8.2f}"
        rows.append(f"{name:<{width}} {ms} {ratio} {against} {_peak(c, phase)} {_errors(c)}")
    return rows


def _peak(contender: dict[str, Any], phase: str) -> str:
    peak = contender["peak_extra_mib"]
    return f"{peak[phase]:9.0f}" if peak else f"{'-':>9}"


def _errors(contender: dict[str, Any]) -> str:
    """Signed error of the loss, RMS errors of the gradients."""
    errors = contender.get("error")
    if errors is None:
        return ""
    return " ".join(
        f"{_percent(errors[key], LOSS_LIMIT if key == 'loss' else GRADIENT_LIMIT):>8}"
        for key in ("loss", "grad_hidden", "grad_weight")
    )


def _percent(error: float | None, limit: float) -> str:
    if error is None:
        return "-"
    digits = f"{error:.1e}" if abs(error) < 5e-4 else f"{100 * error:.2f}%"
    return digits + ("" if abs(error) <= limit else "!")
