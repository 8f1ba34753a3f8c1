"""Commands side by side, each in a process of its own that starts with the libraries imported."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

_PRELOADED = ["opsd_train.run", "opsd_train.evaluation.evaluate", "opsd_train.report"]

BUSY = 75
"""Exit code of a job that an earlier process is still at."""


@dataclass(frozen=True)
class Job:
    """A command of `python -m opsd_train`; it waits for the jobs it `needs`."""

    id: str
    argv: list[str]
    log: Path
    needs: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    job: Job
    code: int
    seconds: float


def run_jobs(jobs: Sequence[Job], count: int) -> Iterator[Ended]:
    """Runs `count` jobs at a time, in their order as far as needs allow, and yields each end.

    A job whose need failed is not run: it yields with the need's code. On Ctrl-C or SIGTERM, or if
    the caller stops early, what runs gets a SIGTERM, keeps what it can and is waited for.
    """
    threads = max(1, (os.cpu_count() or 1) // count)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting, codes = list(jobs), {}
    running: dict[int, tuple[ForkServerProcess, Job, float]] = {}
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
                    process = _start(context, job, threads)
                    running[process.sentinel] = process, job, time.perf_counter()
            for sentinel in wait(list(running)):
                process, job, started = running.pop(sentinel)
                process.join()
                codes[job.id] = process.exitcode
                yield Ended(job, process.exitcode, time.perf_counter() - started)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)


def _start(context: ForkServerContext, job: Job, threads: int) -> ForkServerProcess:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_work, args=(job.argv, str(job.log), threads))
    process.start()
    return process


def _work(argv: list[str], log: str, threads: int) -> None:
    from opsd_train.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        sys.exit(BUSY)  # a study that was killed has left this run running
    os.truncate(file, 0)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    torch.set_num_threads(threads)
    sys.exit(main(argv))
