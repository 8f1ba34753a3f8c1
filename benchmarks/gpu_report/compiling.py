"""Fill Triton's cache from many processes at once, so that timed processes do not compile."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from benchmarks.gpu_report import losses, sweeps
from benchmarks.gpu_report.job import SMALL_TOKENS, GpuJob, deal
from benchmarks.gpu_report.work import one_by_one
from benchmarks.losses.call import call
from benchmarks.losses.cases import COMPILED, find
from benchmarks.losses.contenders import contenders
from benchmarks.losses.inputs import Inputs

_TOKENS = 1024  # more than one block of rows: the first block may differ from later ones
_SMALL_CASES = 1  # of the second command
_PEERS = "peers"


def shards(job: GpuJob) -> list[list[str]]:
    """The tiles of the first command, or the cases of the second."""
    if job.command == "first":
        return deal(sweeps.tile_ids(job), job.workers)
    # Cases that differ only in tokens or inputs have the same kernels.
    cases = {
        (c.operation, c.head, c.dtype, c.shape): c.id for c in map(find, reversed(losses.ids(job)))
    }
    ids = list(cases.values())[::-1]
    if job.small:
        return deal(ids[:_SMALL_CASES], job.workers)
    return deal([*(f"{i} {_PEERS}" for i in losses.ids(job)[:COMPILED]), *ids], job.workers)


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """Compile the kernels of one tile or case."""
    if job.command == "first":
        sweeps.compile_one(identifier, job)
        return {}
    identifier, *peers = identifier.split()
    case = find(identifier)
    if peers:  # compiled by torch.compile for this shape and cached on disk
        x = Inputs(case, job.device)
        for contender in contenders(case, job.device):
            if contender.compiles and not contender.why_not(case, job.device, 2**63):
                with suppress(Exception):  # a peer's error: the losses stage reports it
                    call(contender, x)
        return {}
    # The kernels depend on the head's size, not on the inputs.
    case = replace(
        case, tokens=min(case.tokens, SMALL_TOKENS if job.small else _TOKENS), inputs="random"
    )
    x = Inputs(case, job.device)
    for contender in contenders(case, job.device):
        if contender.role == "ours":
            call(contender, x)
    return {}


work = one_by_one(run)
