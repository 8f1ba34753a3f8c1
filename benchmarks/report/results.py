"""The README's figures: one row of each kind of measurement, beside the best of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report.data import Case, Contender, Demo, Device, ReportError, Share, TrainStep
from benchmarks.report.files import ROOT
from benchmarks.report.tables import (
    TIMES,
    Table,
    dtype_text,
    duration_text,
    headline,
    mib_text,
    ratio_text,
    time_text,
)
from benchmarks.train_step.settings import command_of

STUDY = ROOT / "docs" / "study"
Row = tuple[str, str, str, str]


def results_table(devices: list[Device], study: Path = STUDY) -> Table:
    """The JSD and a training step on a GPU and on a CPU, the demo, the study."""
    rows = []
    for device in reversed(devices):
        rows += [*_loss_rows(device), *_gpu_step_rows(device)]
    rows += [_step_row(device) for device in devices if device.steps]
    rows += [_demo_row(demo) for device in devices for demo in device.demos.values()]
    rows.append(_study_row(study))
    return Table(("measured", "opsd", "best competitor", "command"), tuple(rows), names=4)


def memory_text(study: Path = STUDY) -> str:
    """Peak memory of a step at the most tokens that were measured with both."""
    from benchmarks.study.tables import measured_memory

    found = measured_memory(_study(study))
    if found is None:
        raise ReportError(f"{study} has no peak memory that was measured with and without logits")
    tokens, plain, ours = found
    return (
        f"SmolLM2-135M, {tokens:,} tokens: on top of the model a training step needs "
        f"{mib_text(plain)} with plain logits and {mib_text(ours)} with opsd_kernels, "
        f"{plain / ours:.0f}x less."
    )


def _loss_rows(device: Device) -> Iterator[Row]:
    """The headline case, and on a GPU the same with a trained head."""
    case = headline(device)
    if case is None:
        return
    trained = (
        device.cases.get(case.id.replace("-frozen-", "-trained-"))
        if device.kind == "cuda"
        else None
    )
    for found in (case, trained):
        if found is not None and found.ours is not None and found.fastest_peer is not None:
            yield _loss_row(found, device)


def _loss_row(case: Case, device: Device) -> Row:
    peer = case.fastest_peer
    where = _place(device.name, case.source.environment)
    head = "" if case.head == "frozen" else f", {case.head}"
    what = f"{case.title}, forward and backward, {dtype_text(case)}; {case.shape}'s head{head}, "
    command = (
        "python -m benchmarks.gpu_report second --out FOLDER"
        if device.kind == "cuda"
        else f"pytest benchmarks --benchmark --full -k {case.id}"
    )
    return (
        f"{what}{case.tokens:,} tokens; {where}",
        f"{ratio_text(case.floors(case.ours))}{TIMES} the bare GEMMs, "
        f"{mib_text(case.peak(case.ours))}",
        f"{peer.name}: {_cost(case, peer)}",
        f"`{command}`",
    )


def _cost(case: Case, who: Contender) -> str:
    return f"{ratio_text(case.floors(who))}{TIMES}, {mib_text(case.peak(who))}"


def _gpu_step_rows(device: Device) -> Iterator[Row]:
    """A whole step as last measured, with the most sequences at once that others took too."""
    compared = [[s for s in report.steps if _compared(s)] for report in device.gpu_reports]
    for step in [steps[0] for steps in compared if steps][-1:]:
        n, tokens = (step.settings[name] for name in ("sequences", "completion"))
        what = f"OPSD step, Qwen3-1.7B's shape with LoRA, {n} sequences, {tokens:,} tokens each"
        command = "python -m benchmarks.gpu_report second --out FOLDER"
        yield _row_of_step(step, what, command)


def _compared(step: TrainStep) -> bool:
    return sum(trainer.seconds is not None for trainer in step.trainers) > 1


def _step_row(device: Device) -> Row:
    """The shortest of a device's steps, without gradient checkpointing if it was measured so."""
    step = min(
        device.steps.values(),
        key=lambda step: (step.settings["gradient_checkpointing"], step.settings["tokens"]),
    )
    model, prompts, tokens = (step.settings[name] for name in ("model", "prompts", "tokens"))
    what = f"OPSD step, {model}, {prompts} prompts, {tokens} tokens each"
    return _row_of_step(step, what, command_of(step.settings))


def _row_of_step(step: TrainStep, what: str, command: str) -> Row:
    ours, *others = (trainer for trainer in step.trainers if trainer.seconds)
    best = min(others, key=lambda trainer: trainer.seconds)
    environment = step.source.environment

    def cost(trainer: Any) -> str:
        return f"{time_text(trainer.seconds)}, {mib_text(trainer.peak_extra_mib)}"

    return (
        f"{what}; {_place(environment['device'], environment)}",
        cost(ours),
        f"{best.name}: {cost(best)}",
        f"`{command}`",
    )


def _demo_row(demo: Demo) -> Row:
    return (
        f"Demo: held-out accuracy after {demo.steps} steps, {duration_text(demo.seconds)}; "
        f"{_place(demo.source.environment['device'], demo.source.environment)}",
        _share(demo.after),
        f"before training: {_share(demo.before)}",
        "`make train`",
    )


def _study_row(study: Path) -> Row:
    """OPSD's accuracy in the study's main comparison, beside the best other method's."""
    results = _study(study)
    from benchmarks.study.comparison import compare
    from benchmarks.study.outcomes import BASE
    from benchmarks.study.reading import share_text
    from benchmarks.study.tables import main_comparison

    comparison = main_comparison([compare(results, e) for e in results["experiments"]])
    if comparison is None:
        raise ReportError(f"{study} has no comparison of the methods")
    found = {arm.name: (arm.label, comparison.overall(arm.final)) for arm in comparison.arms}
    own, before = found.pop("opsd")[1], found[BASE][1]
    label, best = max(found.values(), key=lambda pair: pair[1].value)
    return (
        f"The {results['name']} study: mean accuracy over {len(comparison.tasks)} tasks, percent; "
        f"{results['device'].replace('(R)', '')}",
        f"OPSD: {share_text(own)}",
        f"{label}: {share_text(best)}; before training: {share_text(before)}",
        f"`{results['command']}`",
    )


def _study(folder: Path) -> dict[str, Any]:
    # Only here: the figures of benchmarks/results need neither numpy nor the trainer's packages.
    try:
        from benchmarks.study.outcomes import load_results
        from opsd_train.config.errors import UserError
    except ImportError as error:
        raise ReportError(f"the study needs {error.name}: pip install '.[train]'") from None
    try:
        return load_results(folder)
    except UserError as error:
        raise ReportError(str(error)) from None


def _place(name: str, environment: dict[str, Any]) -> str:
    """A GPU's name, or a CPU's with its cores."""
    cores = "" if environment.get("kind") == "cuda" else f", {environment.get('cores')} cores"
    return name.replace("(R)", "") + cores


def _share(share: Share) -> str:
    return f"{100 * share.mean:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
