"""Runs that are killed or stopped at random moments and resumed end like an undisturbed run.

Each launch is its own process (or torchrun with two), as a user would start it; the checks read
only its output and its run folder.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from opsd_train.checkpoint.resume import Checkpoints
from opsd_train.distributed.context import DistributedContext
from tests.helpers.course import assert_same_course, rows, timeless
from tests.helpers.tiny import recipe

ROOT = Path(__file__).parents[3]
EVERY = 2
PATIENCE = 300  # seconds to wait for anything

# When a launch is killed: while loading, after some steps, during a save; or SIGTERM instead.
ONE_RANK = ["load", *["steps"] * 4, "save", *["steps"] * 4, "SIGTERM", "save", *["steps"] * 3]
TWO_RANKS = ["steps", "save", "steps", "SIGTERM", "load", "steps", "save", "steps"]
assert sum(kind != "SIGTERM" for kind in ONE_RANK + TWO_RANKS) >= 20


class Launch:
    """One attempt at the run; its output goes to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "w") as output:
            self.process = psutil.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def said(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log.read_text(), re.MULTILINE)

    def steps(self) -> list[int]:
        """The steps it has printed as finished."""
        return [int(step) for step in self.said(r"^step (\d+)/\d+  .*\n")]

    def wait_until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self.process.poll() is None, f"it ended by itself:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def kill(self) -> None:
        """kill -9 all of its processes: torchrun starts each rank in its own session."""
        try:
            self.process.suspend()  # so that it starts no more children
            family = [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family)

    def finish(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.kill()


def newest(run: Path) -> int:
    """The last step with a finished checkpoint."""
    folders = (run / "checkpoints").glob("step_*")
    return max((int(f.name[5:]) for f in folders if f.suffix != ".tmp"), default=0)


def being_written(run: Path) -> set[tuple[Path, int]]:
    """Unfinished checkpoints; their ctime distinguishes those with the same name."""
    return {(f, f.stat().st_ctime_ns) for f in (run / "checkpoints").glob("*.tmp") if f.exists()}


def end(launch: Launch, kind: str, run: Path, rng: random.Random) -> None:
    """End a launch in this way; returns when all of its processes are gone."""
    start = newest(run)
    if kind == "load":
        time.sleep(rng.uniform(0, 10))
    elif kind == "save":
        before = being_written(run)
        launch.wait_until(lambda: being_written(run) - before)
    else:
        steps = rng.randint(1, 4)
        launch.wait_until(lambda: launch.steps()[-1:] >= [start + steps])
        time.sleep(rng.uniform(0, 0.15))
    if kind == "SIGTERM":
        launch.process.send_signal(signal.SIGTERM)
        launch.finish()
    else:
        launch.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, kinds, total",
    [(1, ONE_RANK, 80), pytest.param(2, TWO_RANKS, 50, marks=pytest.mark.dist)],
)
def test_killed_again_and_again(
    models: Path, tmp_path: Path, capsys, ranks: int, kinds: list[str], total: int
) -> None:
    run, straight, rng = tmp_path / "run", tmp_path / "straight", random.Random(ranks)
    path = tmp_path / "tiny.yaml"
    made = recipe(models / "tied", run) | {
        "steps": total,
        "checkpoint": {"every": EVERY, "keep": 2},
    }
    made["lora"]["dropout"] = 0.3  # so that losses depend on the random streams
    made["evaluation"] |= {"problems": 2, "every": 3}
    path.write_text(yaml.safe_dump(made))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [sys.executable, *(torchrun if ranks == 2 else []), "-m", "opsd_train", str(path)]
    undisturbed = Launch([*command, f"output_dir={straight}"], tmp_path / "straight.log")
    assert undisturbed.finish() == 0, undisturbed.log.read_text()

    whole = Checkpoints(run, 2, DistributedContext(torch.device("cpu")))
    killed_in_a_save = 0
    for attempt, kind in enumerate(kinds):
        start, unfinished = newest(run), being_written(run)
        launch = Launch([*command, "--resume"], tmp_path / f"{attempt}.log")
        try:
            end(launch, kind, run, rng)
        finally:
            launch.kill()
        # It began at the last checkpoint, and lost at most the steps after its own last one.
        steps, found = launch.steps(), newest(run)
        assert steps == list(range(start + 1, start + 1 + len(steps)))
        if steps and start:
            assert launch.said(r"^resuming after step (\d+)") == [str(start)]
        done = start + len(steps)
        assert max(start, (done - 1) // EVERY * EVERY) <= found <= max(start, done)
        if kind == "SIGTERM":
            assert found == done and (ranks == 2 or launch.process.returncode == 143)
            assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        killed_in_a_save += kind == "save" and bool(being_written(run) - unfinished)
        if found:
            assert whole.newest_whole().name == f"step_{found:06d}"
            assert not capsys.readouterr().err
    assert killed_in_a_save > 0

    last = Launch([*command, "--resume"], tmp_path / "last.log")
    assert last.finish() == 0, last.log.read_text()
    assert last.steps()[0] == found + 1
    assert_same_course(run, straight)
    one, two = ([timeless(r) for r in rows(f, "evaluations.jsonl")] for f in (run, straight))
    assert one == two and [r["step"] for r in one] == [*range(0, total, 3), total]
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert not being_written(run)
