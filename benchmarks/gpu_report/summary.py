"""The most important results of a report as lines for the terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_report.job import Row
from benchmarks.losses.table import render

_LONGEST = 6  # kernels shown per call


def lines(report: dict[str, Any], rows: list[Row]) -> list[str]:
    """A line for each ceiling, kernel, sweep and step; then the tables of the losses."""
    shown, cases = [], []
    for row in (row for row in rows if "found" in row):
        stage, name, found = row["stage"], row["id"], row["found"]
        if stage == "ceilings":
            rate = f"{found['gb_per_s']:.0f} GB/s" if name == "copy" else f"{found['tflops']:.0f} T"
            shown.append(f"{stage} {name}: {found['ms']:.3f} ms, {rate}")
        elif stage == "kernels":
            longest = [f"{kernel} {ms:.2f}" for kernel, _, ms in found["kernels"][:_LONGEST]]
            shown.append(f"{stage} {name}: {found['ms']:.2f} ms; {'; '.join(longest)}")
        elif stage == "sweeps":
            shown.append(f"{stage} {name}: {found['ms']:.3f} ms")
        elif stage == "step":
            phases = [f"{phase} {min(values):.3f}" for phase, values in found["phases"].items()]
            peak = f"peak {found['peak_mib']} MiB"
            shown.append(
                f"{stage} {name}: {min(found['seconds']):.3f} s; {'; '.join(phases)}; {peak}"
            )
        elif stage == "training_run":
            phases = [f"{phase} {min(values):.3f}" for phase, values in found["seconds"].items()]
            peaks = [f"{phase} {max(values):.0f}" for phase, values in found["peak_mib"].items()]
            shown.append(f"{stage} {name}: {'; '.join(phases)} s; {'; '.join(peaks)} MiB")
        elif stage == "losses":
            cases.append(found)
    if cases:
        record = {key: report[key] for key in ("environment", "memory_method")}
        shown.append(render(record | {"cases": cases, "skipped": []}))
    return shown
