"""The README's figures: one row of each kind of measurement, beside the best of the others."""

from __future__ import annotations

import statistics
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

STUDY = ROOT / "docs" / "study"
Row = tuple[str, str, str, str]


def results_table(devices: list[Device], study: Path = STUDY) -> Table:
    """At most five rows: the JSD on a GPU and on a CPU, a training step, the demo, the study."""
    rows = [row for device in reversed(devices) for row in _loss_rows(device)]
    rows += [_step_row(step) for device in devices for step in device.steps.values()]
    rows += [_demo_row(demo) for device in devices for demo in device.demos.values()]
    rows.append(_study_row(study))
    return Table(("measured", "opsd", "the best of the others", "command"), tuple(rows), names=4)


def memory_text(study: Path = STUDY) -> str:
    """Peak memory of a step at the most tokens that were measured with both."""
    from benchmarks.study.tables import measured_memory

    found = measured_memory(_study(study))
    if found is None:
        raise ReportError(f"{study} has no peak memory that was measured with and without logits")
    tokens, plain, ours = found
    return (
        f"SmolLM2-135M, {tokens:,} tokens: beside the model a training step needs "
        f"{mib_text(plain)} with plain logits and {mib_text(ours)} with opsd_kernels, "
        f"{plain / ours:.0f}x less."
    )


def _loss_rows(device: Device) -> Iterator[Row]:
    case = headline(device)
    if case is None or case.ours is None:
        return
    peer = case.fastest_peer
    where = _place(device.name, case.source.environment)
    what = f"{case.title}, forward and backward, {dtype_text(case)}; {case.shape}'s head, "
    again = [f"{ratio_text(ratio)} in another run" for ratio in _measured_again(device, case)]
    suffix = f" ({', '.join(again)})" if again else ""
    on_gpu = "python -m benchmarks.gpu_report second --out FOLDER"
    yield (
        f"{what}{case.tokens:,} tokens; {where}",
        f"{ratio_text(case.floors(case.ours))}{TIMES} the bare GEMMs{suffix}, "
        f"{mib_text(case.peak(case.ours))}",
        f"{peer.name}: {_cost(case, peer)}",
        f"`{on_gpu if device.kind == 'cuda' else 'make bench'}`",
    )


def _cost(case: Case, who: Contender) -> str:
    return f"{ratio_text(case.floors(who))}{TIMES}, {mib_text(case.peak(who))}"


def _measured_again(device: Device, case: Case) -> Iterator[float]:
    """Time over the bare products where calls in a row were timed apart, same workspace."""
    name = f"JSD, {case.head}, {dtype_text(case)}, {case.tokens:,} tokens"
    for call in (call for found in device.streams for call in found.calls):
        if call["case"] == name:
            floor, ours = (statistics.median(c["ms"]) for c in call["contenders"][:2])
            yield ours / floor


def _step_row(step: TrainStep) -> Row:
    ours, *others = (trainer for trainer in step.trainers if trainer.seconds)
    best = min(others, key=lambda trainer: trainer.seconds)
    model, prompts, tokens = (step.settings[name] for name in ("model", "prompts", "tokens"))
    what = f"OPSD step, {model}, {prompts} prompts, {tokens} tokens each"

    def cost(trainer: Any) -> str:
        return f"{time_text(trainer.seconds)}, {mib_text(trainer.peak_extra_mib)}"

    return (
        f"{what}; {_place(step.source.environment['device'], step.source.environment)}",
        cost(ours),
        f"{best.name}: {cost(best)}",
        "`python -m benchmarks.train_step`",
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
        f"Study, {results['name']}: mean accuracy over {len(comparison.tasks)} tasks, percent; "
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
