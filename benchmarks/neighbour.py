"""What a busy process on the same cores costs a loss: ours, the bare products and the peers.

    python -m benchmarks.neighbour                     # about a minute
    python -m benchmarks.neighbour --case jsd-frozen-float32-smollm2_135m-256-random

The neighbour multiplies matrices with as many threads as there are cores, as another training run
or a test suite would. It is stopped and continued in turns. A call that keeps all cores busy gets
half of them then, so it takes twice its time at best. Every contender makes one call a turn, in
changing order.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.environment import environment, total_memory
from benchmarks.losses.call import call
from benchmarks.losses.cases import Case, find
from benchmarks.losses.contenders import Contender, contenders
from benchmarks.losses.inputs import Inputs

OUT = Path("runs/benchmarks/neighbour.json")
CASE = "jsd-frozen-bfloat16-smollm2_135m-256-random"
ROUNDS = 7
STATES = ("alone", "beside")
SLOW = 1.5  # a peer whose first call takes more seconds is left out
_BUSY = "import torch; a = torch.randn(1024, 1024); print(flush=True)\nwhile True: a @ a"
_SETTLE = 0.3  # seconds until the neighbour runs, or has stopped


@contextmanager
def neighbour() -> Iterator[subprocess.Popen]:
    """A process that computes without end on all cores, stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # it has imported torch
        process.send_signal(signal.SIGSTOP)
        time.sleep(_SETTLE)
        yield process
    finally:
        process.kill()
        process.communicate()


def measure(case: Case, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """One row per contender: its role and the seconds of every call, alone and beside."""
    device = torch.device("cpu")
    x = Inputs(case, device)
    taking_part = [c for c in contenders(case, device) if _quick(c, case, x)]
    order = list(taking_part)
    seconds = {c.name: {state: [] for state in STATES} for c in taking_part}
    with neighbour() as process:
        for number in range(rounds):
            for state in STATES if number % 2 == 0 else STATES[::-1]:
                process.send_signal(signal.SIGSTOP if state == "alone" else signal.SIGCONT)
                time.sleep(_SETTLE)
                for contender in order:
                    forward, backward, _ = call(contender, x)
                    x.clear()
                    seconds[contender.name][state].append(forward + backward)
                order.append(order.pop(0))
    return [{"name": c.name, "role": c.role, "seconds": seconds[c.name]} for c in taking_part]


def _quick(contender: Contender, case: Case, x: Inputs) -> bool:
    """Whether a contender can run and is quick enough; the call also warms it up."""
    device = torch.device("cpu")
    if contender.why_not(case, device, total_memory(device)):
        return False
    call(contender, x)
    forward, backward, _ = call(contender, x)
    x.clear()
    return contender.role != "peer" or forward + backward < SLOW


def line(row: dict[str, Any]) -> str:
    """A row of the terminal's table."""
    alone, beside = (1e3 * median(row["seconds"][state]) for state in STATES)
    return f"{row['name']:28} {alone:8.1f} ms {beside:8.1f} ms {beside / alone:6.2f}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.neighbour", description=__doc__)
    parser.add_argument(
        "--case", type=find, default=CASE, help=f"a case of the losses' benchmark ({CASE})"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures as JSON ({OUT})")
    options = parser.parse_args()
    rows = measure(options.case)
    result = {
        "kind": "neighbour",
        "environment": environment(),
        "settings": {"case": options.case.id, "rounds": ROUNDS},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'':28} {'alone':>11} {'beside':>11} {'ratio':>6}", *map(line, rows), sep="\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
