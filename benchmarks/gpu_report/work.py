"""A process of a stage: `... .work MODULE JOB`, a JSON list of ids on stdin.

A stage is a module with two functions:
    shards(job)           the ids of its results, a list for each process
    work(ids, job, emit)  emits a row for each of the ids
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_report.job import Emit, Job, Row
from benchmarks.gpu_report.winners import tiles

# Exit status of a process whose CUDA context is lost: the rest of its ids need a new one.
LOST = 17
_MESSAGE = 2000


class Absent(Exception):
    """What was asked for cannot be had on this machine, and that is no failure; says why."""


def one_by_one(run: Callable[[str, Job], dict[str, Any]]) -> Callable[[list[str], Job, Emit], None]:
    """A stage's `work` from a function that returns what was found for one id."""

    def work(ids: list[str], job: Job, emit: Emit) -> None:
        for identifier in ids:
            started = time.time()
            row: Row = {"id": identifier}
            try:
                row["found"] = run(identifier, job)
            except Absent as absent:
                row["absent"] = str(absent)
            except Exception as error:
                traceback.print_exc()
                row["failed"] = message(error)
            emit(row | {"seconds": round(time.time() - started, 2)})
            if "failed" in row:
                leave_if_lost()

    return work


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MESSAGE]


def leave_if_lost() -> None:
    """End the process when an error has cost it its CUDA context."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception:
            sys.stdout.flush()
            sys.exit(LOST)


def main(module_path: str, argument: str) -> None:
    job, ids = Job.from_text(argument), json.load(sys.stdin)
    module = importlib.import_module(module_path)
    with tiles(job.winners or {}):
        module.work(ids, job, job.append)


if __name__ == "__main__":
    main(*sys.argv[1:])
