"""Step time and peak memory of TRL's trainers, as they are and as `fused` makes them.

    python -m benchmarks.integrations                  # all five trainers, about 30 minutes
    python -m benchmarks.integrations --kinds sdft sft

SmolLM2-135M in float32 with LoRA of rank 16 on every linear layer; 8 sequences with 128 tokens of
completion a step; gradient checkpointing, which is TRL's default. Completions are random tokens
instead of generated ones, the same for both, so a step is what follows the rollout. Each trainer is
a fresh process; the two take turns, a step each, and the first step of each is a warm-up.

Time and memory have processes of their own: the environment in which the resident set says what a
step took slows it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import resident
from benchmarks.environment import environment
from benchmarks.integrations.worker import KINDS, SEQUENCES, STEPS, TOKENS
from benchmarks.worker_process import WorkerProcess
from opsd_train.config.errors import UserError

OUT = Path("runs/benchmarks/integrations.json")
CONTENDERS = ("plain", "fused")
WORKER = "benchmarks.integrations.worker"
PEAKS = ("peak_extra_mib", "peak_mib")


def measure(kind: str) -> dict[str, Any]:
    """One row: both contenders' seconds and losses, and their peaks in other processes."""
    trainer, row = _steps(kind, STEPS, {})
    _, weighed = _steps(kind, 2, resident.WORKER_ENV)
    for name in CONTENDERS:
        row[name] |= {key: weighed[name][key] for key in PEAKS}
    return {"trainer": trainer} | row


def _steps(
    kind: str, count: int, environment: Mapping[str, str]
) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """The trainer's name and what each contender's steps after the first gave, taken in turns."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                WorkerProcess(f"{kind}, {name}", WORKER, [kind, name], environment)
            )
            for name in CONTENDERS
        }
        ready = {name: worker.receive()["ready"] for name, worker in workers.items()}
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(count):
            for name, worker in workers.items():
                worker.send("step")
                steps[name].append(worker.receive())
    return ready["plain"], {
        name: {key: [step[key] for step in taken[1:]] for key in taken[0]}
        for name, taken in steps.items()
    }


def line(row: dict[str, Any]) -> str:
    """A row of the terminal's table."""
    plain, ours = row["plain"], row["fused"]
    time, memory = (median(ours[k]) / median(plain[k]) for k in ("seconds", "peak_extra_mib"))
    return (
        f"{row['trainer']:22} {median(plain['seconds']):7.2f} s {median(ours['seconds']):7.2f} s "
        f"{time:6.2f}   {median(plain['peak_extra_mib']):7.0f} MiB "
        f"{median(ours['peak_extra_mib']):7.0f} MiB {memory:6.2f}"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.integrations", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures as JSON ({OUT})")
    options = parser.parse_args()
    why_not = resident.why_not()
    if why_not:
        raise SystemExit(f"error: {why_not}")
    settings = {"model": "SmolLM2-135M", "dtype": "float32", "sequences": SEQUENCES,
                "tokens": TOKENS, "steps": STEPS - 1}  # fmt: skip
    rows: list[dict[str, Any]] = []
    result = {
        "kind": "integrations",
        "environment": environment(),
        "settings": settings,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'trainer':22} {'plain':>9} {'fused':>9} {'ratio':>6}   memory during a step")
    for kind in options.kinds:
        try:
            rows.append(measure(kind))
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        print(line(rows[-1]), flush=True)
        # After every row: a trainer that fails later loses none.
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
