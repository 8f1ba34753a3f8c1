"""Run the stages of a command: processes, time limits, failures."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from typing import IO, Any
from unittest import mock

from benchmarks.environment import ROOT
from benchmarks.gpu_report.job import GpuJob
from benchmarks.gpu_report.work import LOST, Absent, message

_POLL = 0.05


@dataclass(frozen=True)
class Stage:
    """A stage: a module with `shards` and `work` (see work.py), and its time limit in seconds.

    `triton`: on a CPU its processes run Triton's kernels in the interpreter. `module`: its path, if
    it is not in this package.
    """

    name: str
    limit: float
    triton: bool = False
    module: str | None = None

    @property
    def path(self) -> str:
        """The module's import path."""
        return self.module or f"benchmarks.gpu_report.{self.name}"


class Worker:
    """A process that works through some ids; if it dies, it is started again for the rest."""

    def __init__(self, module: str, ids: list[str], job: GpuJob, log: IO[str]) -> None:
        self.module, self.ids, self.job, self.log = module, ids, job, log
        self.left = list(ids)
        self._start()

    def _start(self) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_report.work", self.module, self.job.as_text()],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            self.process.stdin.write(json.dumps(self.left))
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; `ended` finds its exit status

    def ended(self) -> bool:
        """Whether all ids are done. If the process died, record that and start it for the rest."""
        code = self.process.poll()
        if code is None:
            return False
        done = {row["id"] for row in self.job.rows()}
        self.left = [i for i in self.ids if i not in done]
        if self.left and code != LOST:
            why = f"its process ended with exit status {code} before it was done"
            self.job.append({"id": self.left.pop(0), "failed": why})
        if self.left:
            self._start()
        return not self.left

    def stop(self) -> None:
        """Kill the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def run_stage(stage: Stage, job: GpuJob, limit: float) -> dict[str, Any]:
    """Run the stage for at most `limit` seconds; all its ids have rows then. Returns a summary."""
    interpreted = stage.triton and job.device.type != "cuda"
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if interpreted else {}):
        return _run(stage, job.at(stage.name), limit)


def _run(stage: Stage, job: GpuJob, limit: float) -> dict[str, Any]:
    started = time.time()
    print(f"{stage.name}: at most {max(0.0, limit):.0f} s", flush=True)
    shards: list[list[str]] = []
    try:
        shards = importlib.import_module(stage.path).shards(job)
        if not shards:
            raise RuntimeError("there is nothing to do")
    except Absent as absent:
        job.append({"id": "all of it", "absent": str(absent)})
    except Exception as error:
        traceback.print_exc()
        job.append({"id": "the list of its ids", "failed": message(error)})
    if limit > 0:
        why = f"not done: the stage was stopped after {limit:.3g} s"
        with job.file("log").open("a") as log:
            _work(stage, shards, job, log, started + limit)
    else:
        why = "no time was left"
    done = {row["id"] for row in job.rows()}
    for identifier in (i for ids in shards for i in ids if i not in done):
        job.append({"id": identifier, "failed": why})
    rows = job.rows()
    counts = {what: sum(what in row for row in rows) for what in ("found", "absent", "failed")}
    seconds = round(time.time() - started, 1)
    print(f"  {seconds} s: " + ", ".join(f"{n} {what}" for what, n in counts.items()), flush=True)
    return {"name": stage.name, "limit": round(limit, 1), "seconds": seconds, **counts}


def _work(
    stage: Stage, shards: list[list[str]], job: GpuJob, log: IO[str], deadline: float
) -> None:
    workers: list[Worker] = []
    try:
        workers += [Worker(stage.path, ids, job, log) for ids in shards]
        running = list(workers)
        while running and time.time() < deadline:
            running = [worker for worker in running if not worker.ended()]
            time.sleep(_POLL)
    finally:
        for worker in workers:
            worker.stop()
