"""The measurement: one process per contender, one step of each per round.

On a CPU time and memory have processes of their own: the environment in which the resident set says
what a step took makes it twice as slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from benchmarks.environment import default_device
from benchmarks.resident import WORKER_ENV
from benchmarks.train_step.registry import CONTENDERS
from benchmarks.train_step.settings import Settings
from benchmarks.worker_process import WorkerProcess
from opsd_train.config.errors import UserError

WORKER = "benchmarks.train_step.worker"
PEAKS = ("peak_extra_mib", "peak_mib")


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
        workers = [
            stack.enter_context(WorkerProcess(name, WORKER, [name], environment))
            for name in CONTENDERS
        ]
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
