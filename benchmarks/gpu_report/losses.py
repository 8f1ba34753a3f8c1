"""Times, memory and errors of the losses and their peers; the JSD first."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_report.job import GpuJob, deal
from benchmarks.gpu_report.work import Absent, one_by_one
from benchmarks.losses.cases import COMPILED, check_cases, default_cases, find
from benchmarks.losses.contenders import OURS, SHARED, Contender
from benchmarks.losses.inputs import MissingInputs
from benchmarks.losses.memory import CudaMemory, NoMemory
from benchmarks.losses.runner import measure

_ROUNDS, _LATER_ROUNDS = 2, 1  # of several calls each
_WIDE = 4  # the first cases, with all our schedules and _ROUNDS
_PATIENCE = 0.15  # seconds; a slower peer is timed once


def shards(job: GpuJob) -> list[list[str]]:
    """All cases in one process."""
    return deal(ids(job), 1)


def ids(job: GpuJob) -> list[str]:
    """The cases, in order."""
    if job.small:  # one case of each loss, in a dtype that Triton's interpreter gets right
        cases = [case for case in check_cases() if case.dtype == "float32"][::3]
    else:
        cases = default_cases(job.device)
    return [case.id for case in cases]


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """The case's JSON, as in the loss benchmarks."""
    place = ids(job).index(identifier)
    compiled = not job.small and place < COMPILED
    rounds = _ROUNDS if place < _WIDE else _LATER_ROUNDS
    wanted = None if place < _WIDE else _narrow
    try:
        return measure(
            find(identifier), job.device, _memory(job), patience=_PATIENCE, compiled=compiled,
            rounds=1 if job.small else rounds, wanted=wanted,
        )  # fmt: skip
    except MissingInputs as error:
        raise Absent(str(error)) from None
    finally:
        if job.device.type == "cuda":
            torch.cuda.empty_cache()


def _narrow(contender: Contender) -> bool:
    """Whether a contender runs in later cases: of ours only the default and the shared head."""
    return contender.role != "ours" or contender.name in (OURS, SHARED)


def _memory(job: GpuJob) -> CudaMemory | NoMemory:
    return CudaMemory() if job.device.type == "cuda" else NoMemory()


work = one_by_one(run)
