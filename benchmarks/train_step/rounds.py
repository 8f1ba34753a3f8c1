"""The measurement: one process per contender, one step of each per round.

On a CPU time and memory have processes of their own: the environment in which the resident set says
what a step took makes it twice as slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from benchmarks.environment import ROOT, default_device
from benchmarks.resident import WORKER_ENV
from benchmarks.train_step.registry import CONTENDERS
from benchmarks.train_step.settings import Settings
from opsd_train.config.errors import UserError

PEAKS = ("peak_extra_mib", "peak_mib")


class WorkerProcess:
    """Starts worker.py for one contender and talks to it; a context manager."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step.worker", name],
            cwd=ROOT,
            env=os.environ | dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:  # it may be in the middle of a long step
            self._process.kill()
        self._process.communicate()  # closes its stdin, which ends it
        self._errors.close()

    def send(self, do: str, **values: Any) -> None:
        """Send a command. Raises UserError if the process has died."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UserError(self._death()) from None

    def receive(self) -> dict[str, Any]:
        """Wait for an answer. Raises UserError if the process has died."""
        line = self._process.stdout.readline()
        if not line:
            raise UserError(self._death())
        return json.loads(line)

    def _death(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it left no message")
        return f"{self.name}: its process ended with code {code}: {last.strip()}"


def measure(settings: Settings, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure all contenders; returns the JSON file's entry of each, by name."""
    found = _rounds(settings, settings.steps, {}, say)
    if default_device().type == "cpu":
        say("once more, for peak memory")
        for name, other in _rounds(settings, 1, WORKER_ENV, say).items():
            found[name] |= {key: other[key] for key in PEAKS if key in other}
    return found


def _rounds(
    settings: Settings, steps: int, environment: Mapping[str, str], say: Callable[[str], None]
) -> dict[str, Any]:
    """A warm-up and so many steps of every contender, in turns, with `environment` set."""
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(name, environment)) for name in CONTENDERS]
        for worker in workers:
            worker.send("setup", **(settings.as_json() | {"steps": steps}))
        results, running = {}, []
        for worker in workers:
            answer = worker.receive()
            if "error" in answer:
                raise UserError(answer["error"])
            if "ready" in answer:
                running.append(worker)
                results[worker.name] = {"setup": answer["ready"], "steps": []}
            else:
                results[worker.name] = answer
        for number in range(steps + 1):
            for worker in running:
                worker.send("step")
                step = worker.receive()
                if number > 0:  # the first round warms up
                    results[worker.name]["steps"].append(step)
                round_name = f"step {number}" if number else "warm-up"
                say(f"{round_name}, {worker.name}: {step['seconds']:.1f} s")
    return {name: _gathered(result) for name, result in results.items()}


def _gathered(result: dict[str, Any]) -> dict[str, Any]:
    """Values of all steps as lists; of the peaks the largest."""
    if "why_not" in result:
        return result
    steps = result["steps"]
    return {
        "setup": result["setup"],
        "seconds": [step["seconds"] for step in steps],
        "phases": {name: [s["phases"][name] for s in steps] for name in steps[0]["phases"]},
        **{key: _largest(steps, key) for key in PEAKS},
        "loss_tokens": _only([step["loss_tokens"] for step in steps]),
        "loss": [step["loss"] for step in steps],
    }


def _largest(steps: list[dict[str, Any]], key: str) -> float | None:
    values = [step[key] for step in steps]
    return None if None in values else max(values)


def _only(values: list[int]) -> int:
    """The number of loss tokens of every step; if they differ, a completion ended early."""
    if len(set(values)) != 1:
        raise RuntimeError(f"loss tokens differ between steps: {values}")
    return values[0]
