"""Times, memory and errors of the losses, the JSD beside its peers first."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_report.job import Job, deal
from benchmarks.gpu_report.work import Absent, one_by_one
from benchmarks.losses.cases import COMPILED, check_cases, default_cases, find
from benchmarks.losses.contenders import OURS, SHARED, Contender
from benchmarks.losses.inputs import MissingInputs
from benchmarks.losses.memory import CudaMemory, NoMemory
from benchmarks.losses.runner import measure

_ROUNDS, _LATER_ROUNDS = 3, 1  # each of several calls
# So many first cases have every way of ours and all rounds.
_WIDE = 4
_PATIENCE = 0.15  # seconds; a slower peer is timed once, as there are minutes for all cases


def shards(job: Job) -> list[list[str]]:
    return deal(ids(job), 1)


def ids(job: Job) -> list[str]:
    if job.small:  # one of each loss, in a dtype that Triton's interpreter computes rightly
        cases = [case for case in check_cases() if case.dtype == "float32"][::3]
    else:
        cases = default_cases(job.device)
    return [case.id for case in cases]


def run(identifier: str, job: Job) -> dict[str, Any]:
    """The case as the loss benchmarks record it."""
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
    """Whether it takes part in later cases: of ours the default, and with a shared head."""
    return contender.role != "ours" or contender.name in (OURS, SHARED)


def _memory(job: Job) -> CudaMemory | NoMemory:
    return CudaMemory() if job.device.type == "cuda" else NoMemory()


work = one_by_one(run)
