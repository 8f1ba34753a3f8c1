"""The benchmark's JSON files: found, read, checked, and merged per device."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report.data import (
    Ahead,
    Case,
    Contender,
    DecodedBatch,
    Decoding,
    Demo,
    Device,
    GpuReport,
    Integrations,
    Json,
    Neighbour,
    PatchedTrainer,
    ReportError,
    Share,
    Source,
    SparseAccuracy,
    SparseTeacher,
    Trainer,
    TrainStep,
)
from benchmarks.report.gpu import group_steps

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def load(paths: Iterable[Path]) -> list[Device]:
    """The devices in these files and folders: CPUs first, each with its newest results."""
    contents = [(_read(path), path) for path in _files(paths)]
    # Stable: of two files of one date, the one later in the alphabet.
    contents.sort(key=lambda item: str(item[0]["environment"].get("date") or ""))
    devices: dict[str, Device] = {}
    for content, path in contents:
        try:
            _add(devices, content, path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            kind = content["kind"]
            raise ReportError(f"{path} is not as kind {kind!r} should be: {what}") from None
    for device in devices.values():
        device.cases = {case.id: case for case in sorted(device.cases.values(), key=_order)}
        device.skipped = {i: why for i, why in device.skipped.items() if i not in device.cases}
    return sorted(devices.values(), key=lambda d: (d.kind != "cpu", d.name))


def _files(paths: Iterable[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise ReportError(f"there is no .json file in {path}")
        files |= {file.resolve(): file for file in found}
    return [files[key] for key in sorted(files)]


def _read(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{path} is not valid JSON: {error}") from None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind not in _READERS:
        known = ", ".join(_READERS)
        raise ReportError(f"{path} has kind {kind!r}; it must be one of {known}")
    environment = content.get("environment")
    if not isinstance(environment, dict) or not environment.get("device"):
        raise ReportError(f"{path} does not name the device: no 'environment' with 'device'")
    return content


def _add(devices: dict[str, Device], content: Json, path: Path) -> None:
    environment = content["environment"]
    inside = path.resolve().is_relative_to(ROOT)
    file = path.resolve().relative_to(ROOT).as_posix() if inside else path.name
    name = str(environment["device"])
    device = devices.setdefault(name, Device(name, environment.get("kind") or "cpu"))
    source = Source(file, environment, content.get("memory_method"))
    _READERS[content["kind"]](device, content, source)


def _losses(device: Device, content: Json, source: Source) -> None:
    for case in content["cases"]:
        device.cases[case["id"]] = _case(case, source)
    for skipped in content.get("skipped") or []:
        device.skipped[skipped["id"]] = str(skipped["why"])


def _case(case: Json, source: Source) -> Case:
    words = {key: str(case[key]) for key in ("id", "operation", "head", "dtype", "shape", "inputs")}
    sizes = {key: int(case[key]) for key in ("tokens", "hidden", "vocab")}
    rest = {key: case.get(key) for key in ("gemms", "rounds", "error_rows", "plan")}
    contenders = tuple(_contender(name, value) for name, value in case["contenders"].items())
    title = case.get("title") or words["operation"]
    return Case(**words, **sizes, **rest, title=title, contenders=contenders, source=source)


def _contender(name: str, value: Json) -> Contender:
    if value["role"] not in ("floor", "ours", "peer"):
        raise ValueError(f"{name} has role {value['role']!r}")
    return Contender(
        name=name,
        role=value["role"],
        seconds=_medians(value.get("seconds")),
        samples=max(map(len, (value.get("seconds") or {}).values()), default=0),
        peak_extra_mib={k: _number(v) for k, v in (value.get("peak_extra_mib") or {}).items()},
        error={k: _number(v) for k, v in (value.get("error") or {}).items()},
        why_not=value.get("why_not"),
        peak_why=value.get("peak_why"),
    )


def _train_step(device: Device, content: Json, source: Source) -> None:
    settings = content["settings"]
    trainers = tuple(_trainer(name, value) for name, value in content["contenders"].items())
    step = TrainStep(dict(settings), trainers, source)
    device.steps[json.dumps(settings, sort_keys=True)] = step


def _trainer(name: str, value: Json) -> Trainer:
    seconds, losses = value.get("seconds"), value.get("loss")
    rollouts = (value.get("phases") or {}).get("rollout") or []
    # A step measured without its rollout is all training.
    training = [s - r for s, r in zip(seconds or [], rollouts, strict=True)] if rollouts else []
    return Trainer(
        name=name,
        phases=_medians(value.get("phases")),
        seconds=statistics.median(seconds) if seconds else None,
        training=statistics.median(training) if training else None,
        peak_extra_mib=_number(value.get("peak_extra_mib")),
        peak_mib=_number(value.get("peak_mib")),
        loss_tokens=value.get("loss_tokens"),
        loss=statistics.fmean(losses) if losses else None,
        why_not=value.get("why_not"),
    )


def _demo(device: Device, content: Json, source: Source) -> None:
    summary, recipe = content["summary"], content["recipe"]
    before, after, paired = (_there(summary, key) for key in ("before", "after", "paired"))
    divergence = (summary.get("divergence_before"), summary.get("divergence_after"))
    majority = summary.get("majority")
    device.demos[recipe] = Demo(
        recipe=recipe,
        steps=int(summary["steps"]),
        problems=int(before["problems"]),
        before=_share(before, "accuracy"),
        after=_share(after, "accuracy"),
        gain=_share(paired, "difference"),
        gained=int(paired["gained"]),
        lost=int(paired["lost"]),
        teacher=_share(summary["teacher"], "accuracy") if summary.get("teacher") else None,
        majority=(str(majority["answer"]), float(majority["accuracy"])) if majority else None,
        divergence=None if None in divergence else divergence,
        tokens=int(summary["tokens"]),
        peak_mib=float(summary["peak_memory_mib"]),
        seconds=float(summary["seconds"]["total"]),
        source=source,
    )


def _compile(device: Device, content: Json, source: Source) -> None:
    """Checked by `benchmarks.compile`; docs/gpu.md names the file, and no table shows it."""


def _gpu_report(device: Device, content: Json, source: Source) -> None:
    """Its cases are like those of kind losses; the rest is shown by report/gpu.py."""
    if content["small"]:
        raise ValueError("it is a rehearsal (--small) and measures nothing")
    rows = content["rows"]
    for row in rows:
        if row["stage"] == "losses":
            if "found" in row:
                device.cases[row["id"]] = _case(row["found"], source)
            else:
                device.skipped[row["id"]] = str(row.get("absent") or row["failed"])
    steps = []
    for group in group_steps([row for row in rows if row["stage"] == "step"]).values():
        settings = next((row["found"]["settings"] for row in group.values() if "found" in row), {})
        trainers = [
            _trainer(name, row.get("found") or {"why_not": row.get("absent") or row["failed"]})
            for name, row in group.items()
        ]
        if settings:  # else nobody ended a step, as the list of what failed says
            steps.append(TrainStep(settings, tuple(trainers), source))
    report = GpuReport(content["stages"], rows, content["failed"], steps, source)
    device.gpu_reports.append(report)


def _integrations(device: Device, content: Json, source: Source) -> None:
    def medians(row: Json, key: str) -> tuple[float, float]:
        return statistics.median(row["plain"][key]), statistics.median(row["fused"][key])

    trainers = tuple(
        PatchedTrainer(row["trainer"], medians(row, "seconds"), medians(row, "peak_extra_mib"))
        for row in content["rows"]
    )
    device.integrations.append(Integrations(dict(content["settings"]), trainers, source))


def _decode(device: Device, content: Json, source: Source) -> None:
    def speed(row: Json, name: str) -> float:
        return row["batch"] * row["tokens"] / statistics.median(row["seconds"][name])

    batches = tuple(
        DecodedBatch(row["dtype"], row["batch"], speed(row, "ours"), speed(row, "generate"))
        for row in content["rows"]
    )
    device.decodings.append(Decoding(dict(content["settings"]), batches, source))


def _neighbour(device: Device, content: Json, source: Source) -> None:
    rows = tuple((row["name"], *_medians(row["seconds"]).values()) for row in content["rows"])
    device.neighbours.append(Neighbour(dict(content["settings"]), rows, source))


def _sparse_teacher(device: Device, content: Json, source: Source) -> None:
    rows = tuple(content["rows"])
    device.sparse_teachers.append(SparseTeacher(dict(content["settings"]), rows, source))


def _sparse_accuracy(device: Device, content: Json, source: Source) -> None:
    rows = tuple((row["k"], _share(row["after"], "accuracy")) for row in content["rows"])
    device.sparse_accuracies.append(SparseAccuracy(dict(content["settings"]), rows, source))


def _ahead(device: Device, content: Json, source: Source) -> None:
    def of_all(ahead: int, key: str) -> float:
        runs = [row[key] for row in content["rows"] if row["ahead"] == ahead]
        return statistics.median(value for run in runs for value in run)

    rows = tuple((ahead, of_all(ahead, "seconds"), of_all(ahead, "rollout")) for ahead in (0, 1))
    device.aheads.append(Ahead(dict(content["settings"]), rows, source))


_READERS = {
    "losses": _losses,
    "train_step": _train_step,
    "demo": _demo,
    "compile": _compile,
    "gpu_report": _gpu_report,
    "integrations": _integrations,
    "decode": _decode,
    "neighbour": _neighbour,
    "sparse_teacher": _sparse_teacher,
    "sparse_accuracy": _sparse_accuracy,
    "ahead": _ahead,
}


def _there(summary: Json, key: str) -> Json:
    # An interrupted run writes null.
    if not summary.get(key):
        raise KeyError(key)
    return summary[key]


def _share(value: Json, key: str) -> Share:
    low, high = value["interval"]
    return Share(float(value[key]), float(low), float(high))


def _medians(samples: dict[str, list[float]] | None) -> dict[str, float]:
    return {k: float(statistics.median(v)) for k, v in (samples or {}).items() if v}


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)


_OPERATIONS = (
    "jsd", "forward_kl", "reverse_kl", "logprob", "cross_entropy", "advantage", "topk", "largest"
)  # fmt: skip


def _order(case: Case) -> tuple[Any, ...]:
    known = case.operation in _OPERATIONS
    rank = _OPERATIONS.index(case.operation) if known else len(_OPERATIONS)
    what = (rank, case.operation, case.title, case.head, case.dtype)
    return (*what, case.vocab, case.hidden, case.shape, case.tokens, case.inputs, case.id)
