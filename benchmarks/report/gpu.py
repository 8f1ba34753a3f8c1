"""The parts of docs/gpu.md: what the commands of `benchmarks.gpu_report` measured.

Measured figures only. What the time model predicts stands on a page of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from benchmarks.report.data import Device, GpuReport, Json, TrainStep
from benchmarks.report.tables import (
    NONE,
    TIMES,
    Table,
    commit_text,
    environment_text,
    files_text,
    mib_text,
    settings_text,
    time_text,
    train_step_table,
)

NOTHING = "This has not been measured on a GPU."
_FAILED_SHOWN = 20
_LETTERS = 60  # of a kernel's name
# Columns of the counters' table: of a kernel's metric, its heading and how it is written.
_COUNTERS = (
    ("gpu__time_duration.sum", "time", lambda ns: time_text(ns / 1e9)),
    ("dram__bytes_read.sum", "read", lambda count: mib_text(count / 2**20)),
    ("dram__bytes_write.sum", "written", lambda count: mib_text(count / 2**20)),
    (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "of memory's rate",
        "{:.0f} %".format,
    ),
    ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "of the SMs' rate", "{:.0f} %".format),
    ("smsp__issue_active.avg.pct_of_peak_sustained_active", "issue slots used", "{:.0f} %".format),
    ("sm__warps_active.avg.pct_of_peak_sustained_active", "warps active", "{:.0f} %".format),
    ("launch__registers_per_thread", "registers", "{:.0f}".format),
)

# A line of text or a table of each report that has the stage; nothing where none has.
Blocks = Iterator[str | Table]


def checks(reports: list[GpuReport]) -> Blocks:
    """Each stage with its counts as it was last run, and the names of what failed or is absent."""
    newest: dict[str, GpuReport] = {}  # of each stage, also of one that never started
    for report in reports:
        newest |= dict.fromkeys((stage["name"] for stage in report.stages), report)
        newest |= {row["stage"]: report for row in report.failed if row["stage"] not in newest}
    if not newest:
        return
    used = [report for report in reports if any(report is other for other in newest.values())]
    files = files_text([report.source for report in used])
    # All on one device; the commits stand in the table.
    yield f"{environment_text(used[-1].source.environment)}. Figures: {files}."
    rows: list[tuple[str, ...]] = []
    outcomes: dict[str, list[Json]] = {"failed": [], "absent": []}
    for name, report in newest.items():
        commit = commit_text(report.source.environment).removeprefix("commit ")
        for stage in (stage for stage in report.stages if stage["name"] == name):
            counts = (f"{stage[k]:,}" for k in ("found", "absent", "failed"))
            rows.append((name, commit, *counts, time_text(stage["seconds"])))
        outcomes["failed"] += [r for r in report.failed if r["stage"] == name]
        outcomes["absent"] += [r for r in report.rows_that("absent") if r["stage"] == name]
    header = ("stage", "commit", "done", "absent here", "failed or not run", "time")
    yield Table(header, tuple(rows), names=2)
    for what, key in (("Failed or not run", "failed"), ("Absent", "absent")):
        named = _by_reason(outcomes[key], key)
        if named:
            more = f" and {len(named) - _FAILED_SHOWN} more" * (len(named) > _FAILED_SHOWN)
            yield f"{what}: {'; '.join(named[:_FAILED_SHOWN])}{more}."


def _by_reason(rows: list[Json], key: str) -> list[str]:
    """A name and its reason, or how many of a stage share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row["stage"], _reason(row[key])), []).append(row["id"])
    return [
        f"{stage}, {names[0] if len(names) == 1 else f'{len(names):,} of them'}: {reason}"
        for (stage, reason), names in groups.items()
    ]


def _reason(text: str) -> str:
    """A line; of a test's traceback what it asserted."""
    asserted = [line[1:] for line in text.splitlines() if line.startswith("E ")]
    return " ".join((asserted[0] if asserted else text).split())[:200]


def products(report: GpuReport) -> Blocks:
    """The copy's rate, and the table of cuBLAS times."""
    found = report.found("ceilings")
    copy = found.pop("copy", None)
    if not found and not copy:
        return
    rate = f" A copy moves {copy['gb_per_s']:,.0f} GB/s, read and written." if copy else ""
    yield f"bf16 operands. {_where(report)}{rate}"
    rows = [
        (name, f" {TIMES} ".join(f"{n:,}" for n in x["shape"]), _ms(x["ms"]), f"{x['tflops']:,.0f}")
        for name, x in found.items()
    ]
    yield Table(
        ("product", f"rows {TIMES} depth {TIMES} columns", "time", "TFLOP/s"), tuple(rows), names=2
    )


def kernels(report: GpuReport) -> Blocks:
    """A table for each call: its kernels and products, longest first."""
    found = report.found("kernels")
    if found:
        yield _where(report)
    for name, call in found.items():
        yield f"{name}, {_ms(call['ms'])} in all: {call['plan']}."
        rows = [(_short(kernel), str(calls), _ms(ms)) for kernel, calls, ms in call["kernels"]]
        yield Table(("kernel or operator", "calls", "time of all"), tuple(rows))


def _short(name: str) -> str:
    """PyTorch's templates have names of hundreds of letters."""
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"


def sweeps(report: GpuReport) -> Blocks:
    found = report.found("sweeps")
    if not found:
        return
    yield f"JSD, frozen head. {_where(report)}"
    rows = [
        (name, _ms(x["ms"]), mib_text(x.get("workspace_mib")), f"{x.get('rows_per_block', NONE)}")
        for name, x in found.items()
    ]
    yield Table(("tiles or workspace", "time", "workspace", "rows per block"), tuple(rows))


def counters(report: GpuReport) -> Blocks:
    for name, found in report.found("counters").items():
        yield f"The longest kernels of one block, {name}, by Nsight Compute. {_where(report)}"
        rows = [
            (k["name"], *(NONE if k.get(m) is None else text(k[m]) for m, _, text in _COUNTERS))
            for k in found["kernels"]
        ]
        yield Table(("kernel", *(heading for _, heading, _ in _COUNTERS)), tuple(rows))


def steps(report: GpuReport) -> Blocks:
    for step in report.steps:
        yield f"Medians: {settings_text(step.settings)}. {_where(report)}"
        yield train_step_table(step)
        yield from _absent(step)


def training(report: GpuReport) -> Blocks:
    for recipe, run in report.found("training_run").items():
        settings = settings_text(run["settings"])
        yield f"Steps of {recipe}, median time and largest peak: {settings}. {_where(report)}"
        peaks = run["peak_mib"]
        rows = [
            (phase, time_text(median(seconds)), mib_text(max(peaks[phase])) if peaks else NONE)
            for phase, seconds in run["seconds"].items()
        ]
        yield Table(("phase", "time", "peak memory"), tuple(rows))


def _absent(step: TrainStep) -> Iterator[str]:
    missing = [f"{t.name}: {t.why_not}" for t in step.trainers if t.why_not]
    if missing:
        yield f"Not measured: {'; '.join(missing)}."


def _where(report: GpuReport) -> str:
    """Device, versions and commit, which stand beside every table."""
    source = report.source
    return f"{environment_text(source.environment)}. Figures: {files_text([source])}."


def _ms(milliseconds: float) -> str:
    return time_text(milliseconds / 1000)


STAGES: dict[str, Callable[[GpuReport], Blocks]] = {
    "gpu_products": products,
    "gpu_kernels": kernels,
    "gpu_sweeps": sweeps,
    "gpu_counters": counters,
    "gpu_step": steps,
    "gpu_trainer": training,
}
PARTS = ("gpu_checks", *STAGES)


def part(name: str, devices: list[Device]) -> list[str | Table]:
    """The blocks of a part of the page; of a thing measured twice, the newest."""
    blocks: list[str | Table] = []
    for device in devices:
        if name == "gpu_checks":
            blocks += checks(device.gpu_reports)
            continue
        found = [list(STAGES[name](report)) for report in device.gpu_reports]
        blocks += [block for report in [x for x in found if x][-1:] for block in report]
    return blocks or [NOTHING]


def group_steps(rows: list[Json]) -> dict[int, dict[str, Json]]:
    """Rows of the stage `step` by sequences at once, then by contender."""
    found: dict[int, dict[str, Json]] = {}
    for row in rows:
        name, _, at_once = row["id"].rpartition(", ")
        found.setdefault(int(at_once.split()[0]), {})[name] = row
    return found
