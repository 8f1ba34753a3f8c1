"""A process of a stage: `python -m benchmarks.gpu_report.work MODULE JOB`, ids as JSON on stdin.

A stage is a module with two functions:
    shards(job)           a list of ids for each process
    work(ids, job, emit)  calls emit with a row for each id
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

from benchmarks.gpu_report.job import Emit, GpuJob, Row
from benchmarks.gpu_report.winners import tiles

# Exit status of a process that lost its CUDA context: a new one does the rest of its ids.
LOST = 17
_MESSAGE = 2000


class Absent(Exception):
    """This machine cannot do it, which is not a failure; the message says why."""


def one_by_one(
    run: Callable[[str, GpuJob], dict[str, Any]],
) -> Callable[[list[str], GpuJob, Emit], None]:
    """A stage's `work`, from a function that returns the result of one id."""

    def work(ids: list[str], job: GpuJob, emit: Emit) -> None:
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
    """The error's type and message, shortened."""
    return f"{type(error).__name__}: {error}"[:_MESSAGE]


def leave_if_lost() -> None:
    """End the process if an error destroyed its CUDA context."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception:
            sys.stdout.flush()
            sys.exit(LOST)


def main(module_path: str, argument: str) -> None:
    """Do a stage's ids with the winners' tiles."""
    job, ids = GpuJob.from_text(argument), json.load(sys.stdin)
    module = importlib.import_module(module_path)
    with tiles(job.winners or {}):
        module.work(ids, job, job.append)


if __name__ == "__main__":
    main(*sys.argv[1:])
