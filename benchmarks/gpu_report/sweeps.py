"""Times of other tiles and workspaces than the launcher's own; the fastest become winners.json.

Every configuration was compiled by many processes before (compiling.py); one times them.
"""

from __future__ import annotations

import json
import statistics
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report.job import SMALL, SMALL_TOKENS, Job, Row, deal
from benchmarks.gpu_report.timing import Timeline, median_ms
from benchmarks.gpu_report.winners import tiles
from benchmarks.gpu_report.work import Absent, one_by_one
from benchmarks.losses.cases import QWEN3_8B, Case
from benchmarks.losses.contenders import ways
from benchmarks.losses.inputs import Inputs
from opsd_kernels import Plan, fused_linear_jsd, plan

_MIB = 2**20
OWN = "own"  # the launcher's choice
# Columns of a row kernel's tile, warps.
_ROW = tuple(product((2048, 4096, 8192), (4, 8, 16)))
_SMALL_ROW = ((128, 1),)
# Rows, columns, inner size, warps, stages of a fused kernel's tile.
_STREAMING = (
    (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 8, 3),
    (64, 128, 64, 4, 3), (64, 128, 64, 8, 4), (64, 256, 64, 8, 3), (64, 128, 128, 8, 2),
)  # fmt: skip
_SMALL_STREAMING = ((16, 32, 16, 1, 1),)
# Rows of a block, reached by workspace_bytes; and workspaces that a user may well have.
_ROWS = (256, 384, 512, 640, 768)
_WORKSPACES = (512, 1024, 2048)  # MiB
_SMALL_ROWS, _SMALL_WORKSPACES = (8,), (1,)
_ROW_TOKENS, _STREAMING_TOKENS, _TOKENS = 768, 2048, 8192
_COMPILED_TOKENS = 32
_CALLS, _SMALL_CALLS = 5, 1
# A winner is this much faster than the launcher's own choice: less is noise.
_GAIN = 0.98


def shards(job: Job) -> list[list[str]]:
    return deal([*tile_ids(job), *_workspace_ids(job)], 1)


def tile_ids(job: Job) -> list[str]:
    """What has to be compiled: a name per configuration, and the launcher's own of each kind."""
    row, streaming = (_SMALL_ROW, _SMALL_STREAMING) if job.small else (_ROW, _STREAMING)
    ids = [f"row {OWN}"] + ["row " + "x".join(map(str, sizes)) for sizes in row]
    if ("streaming", "fp32") in ways(_case(job, 1), job.device):
        ids += [f"streaming {OWN}"]
        ids += ["streaming " + "x".join(map(str, sizes)) for sizes in streaming]
    return ids


def _workspace_ids(job: Job) -> list[str]:
    rows, sizes = (_SMALL_ROWS, _SMALL_WORKSPACES) if job.small else (_ROWS, _WORKSPACES)
    return [f"rows {n}" for n in rows] + [f"workspace {n}" for n in sizes]


def run(identifier: str, job: Job) -> dict[str, Any]:
    """{"ms"} of the row kernels alone, else of a whole call, with its workspace if that varies."""
    kind, value = identifier.split()
    if kind == "row":
        x = Inputs(_case(job, _ROW_TOKENS), job.device)
        return {"ms": _row_kernels(x, identifier, _calls(job))}
    if kind == "streaming":
        x = Inputs(_case(job, _STREAMING_TOKENS), job.device)
        with chosen_tiles(identifier):
            return {"ms": _whole(x, "streaming", None, _calls(job))}
    case = _case(job, _TOKENS)
    workspace = (
        int(value) * _MIB if kind == "workspace" else _bytes_for(case, int(value), job.device)
    )
    ms = _whole(Inputs(case, job.device), "blocked", workspace, _calls(job))
    rows = _plan(case, job.device, workspace).rows_per_block
    return {"ms": ms, "workspace_mib": round(workspace / _MIB, 1), "rows_per_block": rows}


def compile_one(identifier: str, job: Job) -> None:
    """Run the configuration once on few tokens: its kernels are compiled for the timing then."""
    schedule = "streaming" if identifier.startswith("streaming") else "blocked"
    x = Inputs(_case(job, _COMPILED_TOKENS), job.device)
    with chosen_tiles(identifier):
        _call(x, schedule, None)


def chosen_tiles(identifier: str) -> AbstractContextManager[None]:
    return tiles({identifier.split()[0]: blocks_of(identifier)})


def blocks_of(identifier: str) -> dict[str, int]:
    """What an id of `tile_ids` changes of the launcher's blocks."""
    kind, value = identifier.split()
    if value == OWN:
        return {}
    sizes = [int(n) for n in value.split("x")]
    if kind == "row":
        return dict(zip(("columns", "warps"), sizes, strict=True))
    found = dict(zip(("rows", "cols", "inner", "warps", "stages"), sizes, strict=True))
    return found | {"parts": max(1, found["cols"] // 32)}


def write_winners(job: Job, folder: Path, environment: dict[str, Any]) -> None:
    """winners.json: the fastest tiles that were timed, nothing where the launcher's own are."""
    content = {"tiles": winners(job.rows()), "environment": environment}
    (folder / "winners.json").write_text(json.dumps(content, indent=1) + "\n")


def winners(rows: list[Row]) -> dict[str, dict[str, int]]:
    """By kind, "row" and "streaming": blocks that beat the launcher's own by more than noise."""
    found = {}
    for kind in ("row", "streaming"):
        timed = [r for r in rows if r["id"].split()[0] == kind and "found" in r]
        ms = {r["id"]: r["found"]["ms"] for r in timed}
        own = ms.get(f"{kind} {OWN}")
        best = min(ms, key=ms.__getitem__, default=None)
        if own and ms[best] < _GAIN * own:
            found[kind] = blocks_of(best)
    return found


def _calls(job: Job) -> int:
    return _SMALL_CALLS if job.small else _CALLS


def _row_kernels(x: Inputs, identifier: str, calls: int) -> float:
    """Milliseconds in Triton's kernels alone: the products around them do not change."""
    totals = []
    with chosen_tiles(identifier):
        _call(x, "blocked", None)
        for _ in range(calls):
            timeline = Timeline(x.student.device)
            with timeline.watching():
                _call(x, "blocked", None)
            names = timeline.totals()
            totals.append(sum(ms for name, (_, ms) in names.items() if name in timeline.launched))
    return statistics.median(totals)


def _whole(x: Inputs, schedule: str, workspace: int | None, calls: int) -> float:
    return median_ms(lambda: _call(x, schedule, workspace), x.student.device, calls)


def _call(x: Inputs, schedule: str, workspace: int | None) -> None:
    x.clear()
    heads = x.student, x.head, x.teacher, x.teacher_head
    try:
        how = {"schedule": schedule, "precision": "fp32", "workspace_bytes": workspace}
        fused_linear_jsd(*heads, **how).backward()
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # Triton's: the tile is too large for the GPU
            raise Absent(str(error)) from None
        raise


def _bytes_for(case: Case, rows: int, device: torch.device) -> int:
    """What `blocked` takes for so many rows in one block."""
    return _plan(replace(case, tokens=rows), device, 2**40).workspace_bytes


def _plan(case: Case, device: torch.device, workspace: int) -> Plan:
    sizes = case.tokens, case.shape.hidden, case.shape.vocab
    how = {"dtype": case.torch_dtype, "device": device, "backend": "triton"}
    how |= {"schedule": "blocked", "precision": "fp32"}
    return plan(*sizes, workspace_bytes=workspace, **how)


def _case(job: Job, tokens: int) -> Case:
    if job.small:
        return Case("jsd", "frozen", "float32", SMALL, SMALL_TOKENS)
    return Case("jsd", "frozen", "bfloat16", QWEN3_8B, tokens)


work = one_by_one(run)
