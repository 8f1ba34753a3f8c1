"""Time tiles and workspaces other than the launcher's own; the fastest tiles go to winners.json.

Many processes have compiled every configuration before (compiling.py); one process times them.
"""

from __future__ import annotations

import functools
import importlib
import json
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_report.job import SMALL, SMALL_TOKENS, GpuJob, Row, deal
from benchmarks.gpu_report.timing import Timeline, median_ms, parts
from benchmarks.gpu_report.winners import tiles
from benchmarks.gpu_report.work import Absent, one_by_one
from benchmarks.losses.cases import QWEN3_8B, Case
from benchmarks.losses.contenders import ways
from benchmarks.losses.inputs import Inputs
from opsd_kernels import Plan, fused_linear_jsd, plan

# The module: the package's attribute of that name is the function.
plans = importlib.import_module("opsd_kernels.plan")
_MIB = 2**20
OWN = "own"  # the launcher's choice
# Columns of a row kernel's tile, warps.
_ROW = tuple(product((2048, 4096, 8192), (4, 8, 16)))
_SMALL_ROW = ((128, 1),)
# The same for the kernels on differences, with at least 8 columns per thread.
_DIFFERENCE = ((512, 2), (1024, 1), (1024, 2), (1024, 4), (2048, 4), (2048, 8))
# Rows, columns, inner size, warps, stages of a fused kernel's tile.
_STREAMING = (
    (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 8, 3),
    (64, 128, 64, 4, 3), (64, 128, 64, 8, 4), (64, 256, 64, 8, 3), (64, 128, 128, 8, 2),
)  # fmt: skip
_SMALL_STREAMING = ((16, 32, 16, 1, 1),)
# Rows of a block, set through workspace_bytes; and usual workspaces.
_ROWS = (256, 384, 512, 640, 768)
_WORKSPACES = (512, 1024, 2048)  # MiB
_SMALL_ROWS, _SMALL_WORKSPACES = (8,), (1,)
# Rows of a block and columns of a slice, for differences.
_LAYOUTS = (
    (512, 8192), (768, 5632), (1024, 4096), (1024, 8192), (1408, 3072), (2048, 2048), (2048, 4096),
    (2816, 1536), (4096, 4096),
)  # fmt: skip
_ROW_TOKENS, _STREAMING_TOKENS, _TOKENS = 768, 2048, 8192
_COMPILED_TOKENS = 32
_CALLS, _SMALL_CALLS = 5, 1
# A winner takes less than this share of the time of the launcher's own choice; more is noise.
_GAIN = 0.98


def shards(job: GpuJob) -> list[list[str]]:
    """All tiles, layouts and workspaces in one process."""
    return deal([*tile_ids(job), *_workspace_ids(job)], 1)


def tile_ids(job: GpuJob) -> list[str]:
    """Ids of the configurations to compile, the launcher's own of each kind first."""
    row, streaming = (_SMALL_ROW, _SMALL_STREAMING) if job.small else (_ROW, _STREAMING)
    ids = [f"row {OWN}"] + ["row " + "x".join(map(str, sizes)) for sizes in row]
    if ("streaming", "fp32") in ways(_case(job, 1), job.device):
        ids += [f"streaming {OWN}"]
        ids += ["streaming " + "x".join(map(str, sizes)) for sizes in streaming]
    if takes_differences(job):
        ids += [f"difference {OWN}"]
        ids += ["difference " + "x".join(map(str, sizes)) for sizes in _DIFFERENCE]
    return ids


def takes_differences(job: GpuJob) -> bool:
    """Whether `blocked` with differences runs on this device."""
    return ("blocked", "difference") in ways(_case(job, 1), job.device)


def _workspace_ids(job: GpuJob) -> list[str]:
    rows, sizes = (_SMALL_ROWS, _SMALL_WORKSPACES) if job.small else (_ROWS, _WORKSPACES)
    ids = [f"rows {n}" for n in rows]
    if takes_differences(job):
        ids += ["layout " + "x".join(map(str, sizes)) for sizes in _LAYOUTS]
    return ids + [f"workspace {n} {p}" for p in ("fp32", "auto") for n in sizes]


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """{"ms"} of the row kernels or of a whole call; with the workspace where that varies."""
    kind, value, *precision = identifier.split()
    if kind in ("row", "difference"):
        x = _inputs(_case(job, _ROW_TOKENS), job.device)
        return {"ms": _row_kernels(x, identifier, _calls(job))}
    if kind == "streaming":
        x = _inputs(_case(job, _STREAMING_TOKENS), job.device)
        with chosen_tiles(identifier):
            return {"ms": _whole(x, "streaming", "fp32", None, _calls(job))}
    x = _inputs(_case(job, _TOKENS), job.device)
    if kind == "layout":
        rows, columns = map(int, value.split("x"))
        with fixed_layout(rows, columns):
            ms = _whole(x, "blocked", "difference", 2**40, _calls(job))
            return {"ms": ms} | _size(x.case, job.device, "difference", 2**40)
    workspace = _bytes_for(x.case, int(value), job.device)
    if kind == "workspace":
        workspace = int(value) * _MIB
    how = precision[0] if precision else "fp32"
    ms = _whole(x, "blocked", how, workspace, _calls(job))
    return {"ms": ms} | _size(x.case, job.device, how, workspace)


@functools.lru_cache(maxsize=1)
def _inputs(case: Case, device: torch.device) -> Inputs:
    return Inputs(case, device)


@contextmanager
def fixed_layout(rows: int, columns: int) -> Iterator[None]:
    """Within this context plans have blocks of `rows` rows and slices of `columns` columns."""
    own = plans.triton_layout

    def layout(*how: Any) -> Any:
        found = own(*how)
        used = found.workspace_bytes * rows // found.rows
        return replace(found, rows=rows, slice_columns=columns, workspace_bytes=used)

    with mock.patch.object(plans, "triton_layout", layout):
        yield


def compile_one(identifier: str, job: GpuJob) -> None:
    """Run the configuration once on few tokens, which compiles its kernels."""
    schedule = "streaming" if identifier.startswith("streaming") else "blocked"
    x = _inputs(_case(job, _COMPILED_TOKENS), job.device)
    with chosen_tiles(identifier):
        _call(x, schedule, _precision(identifier), None)


def chosen_tiles(identifier: str) -> AbstractContextManager[None]:
    """Within this context launches use the tiles of this id."""
    return tiles({identifier.split()[0]: blocks_of(identifier)})


def blocks_of(identifier: str) -> dict[str, int]:
    """The block sizes in an id of `tile_ids`; empty for the launcher's own."""
    kind, value = identifier.split()
    if value == OWN:
        return {}
    sizes = [int(n) for n in value.split("x")]
    if kind in ("row", "difference"):
        return dict(zip(("columns", "warps"), sizes, strict=True))
    found = dict(zip(("rows", "cols", "inner", "warps", "stages"), sizes, strict=True))
    return found | {"parts": max(1, found["cols"] // 32)}


def write_winners(job: GpuJob, folder: Path, environment: dict[str, Any]) -> None:
    """Write winners.json: the fastest tiles of each kind, unless the launcher's own are."""
    content = {"tiles": winners(job.rows()), "environment": environment}
    (folder / "winners.json").write_text(json.dumps(content, indent=1) + "\n")


def winners(rows: list[Row]) -> dict[str, dict[str, int]]:
    """By kind: the fastest blocks, where they beat the launcher's own by more than noise."""
    found = {}
    for kind in ("row", "streaming", "difference"):
        timed = [r for r in rows if r["id"].split()[0] == kind and "found" in r]
        ms = {r["id"]: r["found"]["ms"] for r in timed}
        own = ms.get(f"{kind} {OWN}")
        best = min(ms, key=ms.__getitem__, default=None)
        if own and ms[best] < _GAIN * own:
            found[kind] = blocks_of(best)
    return found


def _calls(job: GpuJob) -> int:
    return _SMALL_CALLS if job.small else _CALLS


def _precision(identifier: str) -> str:
    return "difference" if identifier.startswith("difference") else "fp32"


def _row_kernels(x: Inputs, identifier: str, calls: int) -> float:
    """Milliseconds in Triton's kernels only: the matrix products around them do not change."""
    device, precision = x.student.device, _precision(identifier)

    def call() -> None:
        _call(x, "blocked", precision, None)

    with chosen_tiles(identifier):
        timeline = Timeline(device)
        with timeline.watching():
            call()
        found = [parts(call, device) for _ in range(calls)]
    return statistics.median(
        sum(ms for name, (_, ms) in each.items() if name in timeline.launched) for each in found
    )


def _whole(x: Inputs, schedule: str, precision: str, workspace: int | None, calls: int) -> float:
    device = x.student.device
    return median_ms(lambda: _call(x, schedule, precision, workspace), device, calls)


def _call(x: Inputs, schedule: str, precision: str, workspace: int | None) -> None:
    x.clear()
    heads = x.student, x.head, x.teacher, x.teacher_head
    try:
        how = {"schedule": schedule, "precision": precision, "workspace_bytes": workspace}
        fused_linear_jsd(*heads, **how).backward()
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # Triton's: the tile is too large for the GPU
            raise Absent(str(error)) from None
        raise


def _bytes_for(case: Case, rows: int, device: torch.device) -> int:
    """The workspace of `blocked` with so many rows in one block."""
    return _plan(replace(case, tokens=rows), device, "fp32", 2**40).workspace_bytes


def _size(case: Case, device: torch.device, precision: str, workspace: int) -> dict[str, Any]:
    found = _plan(case, device, precision, workspace)
    used = round(found.workspace_bytes / _MIB, 1)
    return {"workspace_mib": used, "rows_per_block": found.rows_per_block}


def _plan(case: Case, device: torch.device, precision: str, workspace: int) -> Plan:
    sizes = case.tokens, case.shape.hidden, case.shape.vocab
    how = {"dtype": case.torch_dtype, "device": device, "backend": "triton", "two_passes": True}
    how |= {"schedule": "blocked", "precision": precision}
    return plan(*sizes, workspace_bytes=workspace, **how)


def _case(job: GpuJob, tokens: int) -> Case:
    if job.small:
        return Case("jsd", "frozen", "float32", SMALL, SMALL_TOKENS)
    return Case("jsd", "frozen", "bfloat16", QWEN3_8B, tokens)


work = one_by_one(run)
