"""Run several commands of opsd_train in parallel, each in its own process."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BUSY = 75
"""Exit code of a job that an earlier process is still running."""

_PAUSE = 0.2  # seconds between two polls of the running processes


@dataclass(frozen=True)
class Subprocess:
    """Arguments of `python -m opsd_train`; it starts when the jobs it `needs` have ended."""

    id: str
    argv: list[str]
    log: Path
    needs: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    job: Subprocess
    code: int
    seconds: float


def run_subprocesses(jobs: Sequence[Subprocess], count: int) -> Iterator[Ended]:
    """Run `count` jobs at a time, in order as far as their needs allow, and yield each as it ends.

    A job is not run if one it needs failed: it ends with that job's code. On Ctrl-C or SIGTERM, or
    if the caller stops early, running jobs get a SIGTERM, save a checkpoint and are waited for.
    """
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    waiting, codes = list(jobs), {}
    running: dict[str, tuple[subprocess.Popen, Subprocess, float]] = {}
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        while waiting or running:
            for job in [j for j in waiting if j.needs <= codes.keys()]:
                failed = [codes[name] for name in job.needs if codes[name]]
                if failed:
                    waiting.remove(job)
                    codes[job.id] = failed[0]
                    yield Ended(job, failed[0], 0.0)
                elif len(running) < count:
                    waiting.remove(job)
                    process = _start(job, environment)
                    running[job.id] = process, job, time.perf_counter()
            time.sleep(_PAUSE)
            for process, job, started in list(running.values()):
                if process.poll() is not None:
                    del running[job.id]
                    codes[job.id] = process.returncode
                    yield Ended(job, process.returncode, time.perf_counter() - started)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _start(job: Subprocess, environment: dict[str, str]) -> subprocess.Popen:
    """Start the command with its output in the log, which stays locked while it runs."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "opsd_train", *job.argv]
    with open(job.log, "a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # started by a study that was killed, and still running
            command = [sys.executable, "-c", f"raise SystemExit({BUSY})"]
            return subprocess.Popen(command)
        log.truncate(0)
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
