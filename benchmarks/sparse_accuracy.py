"""The demo's accuracy with a teacher that is known at its k most likely tokens.

    python -m benchmarks.sparse_accuracy   # six runs of the demo

One run of demo/opsd for each k, and one with the whole vocabulary: same seed, problems and steps.
Finished runs are kept in the folder of --runs: the same command continues where the last stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, environment

OUT = ROOT / "benchmarks" / "results" / "sparse_accuracy_cpu.json"
RUNS = ROOT / "runs" / "sparse_accuracy"
RECIPE = "demo/opsd"
KS = (1, 8, 20, 64, 256, None)  # None: the whole vocabulary
_AT_THE_END = ("evaluation.at_start=false", "evaluation.teacher=false")


def overrides(k: int | None) -> list[str]:
    """The changes to the recipe for a teacher known at k tokens."""
    if k is None:
        return ["loss.objective=full_vocabulary"]
    return ["loss.objective=top_k", f"loss.top_k={k}"]


def run(k: int | None, folder: Path) -> dict[str, Any]:
    """Train, unless this has been done; the row of this k."""
    summary = folder / "summary.json"
    if not _finished(summary):
        command = [sys.executable, "-m", "opsd_train", RECIPE, f"output_dir={folder}"]
        command += [*_AT_THE_END, *overrides(k)]
        subprocess.run(command + ["--resume"] * folder.exists(), check=True, cwd=ROOT)
    found = json.loads(summary.read_text(encoding="utf-8"))
    return {"k": k, "after": found["after"], "steps": found["steps"]}


def _finished(summary: Path) -> bool:
    return summary.exists() and json.loads(summary.read_text("utf-8"))["status"] == "finished"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.sparse_accuracy", description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS, help=f"the runs' folders ({RUNS})")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures as JSON ({OUT})")
    options = parser.parse_args()
    rows = []
    for k in KS:
        row = run(k, options.runs / ("whole" if k is None else f"k{k}"))
        rows.append(row)
        after = row["after"]
        low, high = after["interval"]
        print(
            f"k {'whole' if k is None else k:>6}: {after['correct']} of {after['problems']} right, "
            f"{after['accuracy']:.1%} [{low:.1%}, {high:.1%}]",
            flush=True,
        )
    settings = {"recipe": RECIPE, "steps": rows[0]["steps"]}
    result = {
        "kind": "sparse_accuracy",
        "environment": environment(),
        "settings": settings,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
