"""The tables of README and docs: Markdown from results, between the markers of a page.

<!-- benchmark: losses -->
anything here is replaced
<!-- /benchmark: losses -->
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.report import gpu
from benchmarks.report.data import Device, Json, ReportError
from benchmarks.report.results import memory_text, results_table
from benchmarks.report.tables import (
    TIMES,
    Table,
    ahead_table,
    case_text,
    decode_table,
    demo_table,
    demo_text,
    environment_text,
    files_text,
    headline,
    headline_table,
    integrations_table,
    neighbour_table,
    overview_table,
    settings_text,
    sparse_accuracy_table,
    sparse_teacher_table,
    train_step_table,
)
from benchmarks.train_step.settings import command_of

_MARKER = re.compile(r"<!--\s*(/?)benchmark:\s*(\S*)\s*-->")
_WIDTH = 110


def rewrite(text: str, devices: list[Device], name: str = "README.md") -> str:
    """A page with every marked part written again from the results."""
    lines, opened = [], None
    for number, line in enumerate(text.split("\n"), 1):
        marker = _MARKER.fullmatch(line.strip())
        if not marker:
            if opened is None:
                lines.append(line)
            continue
        closing, part = marker.groups()
        where = f"{name}, line {number}"
        if part not in PARTS:
            raise ReportError(f"{where}: unknown marker {part!r}; there are {', '.join(PARTS)}")
        if bool(closing) != (opened is not None) or (closing and part != opened):
            before = f"'{opened}' is still open" if opened else "nothing is open"
            raise ReportError(f"{where}: marker '{closing}{part}', but {before}")
        if closing:
            lines += ["", PARTS[part](devices), ""]
        lines.append(line)
        opened = None if closing else part
    if opened is not None:
        raise ReportError(f"{name}: marker '{opened}' is never closed")
    return "\n".join(lines)


def losses(devices: list[Device]) -> str:
    """The headline case of each device, then every case in one row."""
    measured = [device for device in devices if device.cases]
    if not any(headline(device) for device in measured):
        raise ReportError(
            "marker 'losses': no JSON of kind losses has a jsd case (frozen, bfloat16, random) "
            "that two peers and the bare products computed"
        )
    blocks = [_headline(device) for device in measured if headline(device)]
    return "\n\n".join([*blocks, *map(_overview, measured)])


def train_step(devices: list[Device]) -> str:
    blocks = []
    for step in (step for device in devices for step in device.steps.values()):
        intro = (
            f"One training step, medians: {settings_text(step.settings)}; "
            f"`{command_of(step.settings)}`. "
            f"{environment_text(step.source.environment)}. Figures: {files_text([step.source])}."
        )
        blocks += [_wrapped(intro), markdown(train_step_table(step))]
        missing = [f"{t.name}: {t.why_not}" for t in step.trainers if t.why_not]
        blocks += [_wrapped(f"Not measured: {'; '.join(missing)}.")] if missing else []
    return _joined(blocks, "train_step")


def demo(devices: list[Device]) -> str:
    blocks = []
    for run in (run for device in devices for run in device.demos.values()):
        intro = (
            f"Recipe `{run.recipe}`, {run.steps} steps, {run.problems} held-out problems. "
            f"{environment_text(run.source.environment)}. Figures: {files_text([run.source])}."
        )
        blocks += [_wrapped(intro), markdown(demo_table(run)), _wrapped(demo_text(run))]
    return _joined(blocks, "demo")


def integrations(devices: list[Device]) -> str:
    def what(s: Json) -> str:
        return (
            f"{s['model']} in {s['dtype']} with LoRA, {s['sequences']} sequences with "
            f"{s['tokens']} tokens of completion a step, {s['steps']} steps after a warm-up, the "
            f"rollout left out; medians. Memory is what a step adds."
        )

    found = [device.integrations[-1] for device in devices if device.integrations]
    return _joined(_with_tables(found, what, integrations_table), "integrations")


def decode(devices: list[Device]) -> str:
    def what(s: Json) -> str:
        return (
            f"{s['model']}, {s['tokens']} tokens sampled after each prompt of the demo; tokens per "
            f"second of the median call."
        )

    found = [device.decodings[-1] for device in devices if device.decodings]
    return _joined(_with_tables(found, what, decode_table), "decode")


def neighbour(devices: list[Device]) -> str:
    def what(s: Json) -> str:
        return f"`{s['case']}`, medians of {s['rounds']} calls."

    found = [device.neighbours[-1] for device in devices if device.neighbours]
    return _joined(_with_tables(found, what, neighbour_table), "neighbour")


def sparse_teacher(devices: list[Device]) -> str:
    def what(s: Json) -> str:
        return (
            f"SmolLM2-135M and itself with the solution in its prompt, {s['tokens']} tokens, fp32."
        )

    found = [device.sparse_teachers[-1] for device in devices if device.sparse_teachers]
    return _joined(_with_tables(found, what, sparse_teacher_table), "sparse_teacher")


def sparse_accuracy(devices: list[Device]) -> str:
    def what(s: Json) -> str:
        return f"`{s['recipe']}`, {s['steps']} steps, one seed; accuracy on held-out problems."

    found = [device.sparse_accuracies[-1] for device in devices if device.sparse_accuracies]
    return _joined(_with_tables(found, what, sparse_accuracy_table), "sparse_accuracy")


def ahead(devices: list[Device]) -> str:
    def what(s: Json) -> str:
        runs = "one run" if s["rounds"] == 1 else f"{s['rounds']} runs"
        return (
            f"`{s['recipe']}` on one core, its vLLM server on the other; medians of the steps of "
            f"{runs} each, the first two and the last step of a run left out."
        )

    found = [device.aheads[-1] for device in devices if device.aheads]
    return _joined(_with_tables(found, what, ahead_table), "ahead")


def _with_tables(
    found: list[Any], what: Callable[[Json], str], table: Callable[[Any], Table]
) -> list[str]:
    """Of each measurement: what it is by its settings, where it was made, and its table."""
    blocks = []
    for measured in found:
        source = measured.source
        where = f"{environment_text(source.environment)}. Figures: {files_text([source])}."
        blocks += [_wrapped(f"{what(measured.settings)} {where}"), markdown(table(measured))]
    return blocks


def gpu_losses(devices: list[Device]) -> str:
    """As `losses`, of GPUs alone."""
    measured = [device for device in devices if device.kind == "cuda" and device.cases]
    return losses(measured) if measured else gpu.NOTHING


def gpu_part(name: str, devices: list[Device]) -> str:
    blocks = gpu.part(name, devices)
    return "\n\n".join(_wrapped(b) if isinstance(b, str) else markdown(b) for b in blocks)


def results(devices: list[Device]) -> str:
    """The README's table: each measurement beside the best of the others, with its command."""
    return markdown(results_table(devices))


def memory(devices: list[Device]) -> str:
    """The README's first figure, from the study."""
    return _wrapped(memory_text())


PARTS: dict[str, Callable[[list[Device]], str]] = {
    "losses": losses,
    "train_step": train_step,
    "demo": demo,
    "integrations": integrations,
    "decode": decode,
    "neighbour": neighbour,
    "sparse_teacher": sparse_teacher,
    "sparse_accuracy": sparse_accuracy,
    "ahead": ahead,
    "gpu_losses": gpu_losses,
    **{name: partial(gpu_part, name) for name in gpu.PARTS},
    "results": results,
    "memory": memory,
}


def markdown(table: Table) -> str:
    rows = [list(table.header), ["---"] * table.names]
    rows[1] += ["---:"] * (len(table.header) - table.names)
    for number, cells in enumerate(table.rows):
        bold = number in table.bold
        rows.append([f"**{cell}**" if bold and cell else cell for cell in cells])
    rule = "|" + "|".join(rows.pop(1)) + "|"
    first, *rest = (_row(row) for row in rows)
    return "\n".join([first, rule, *rest])


def _headline(device: Device) -> str:
    case = headline(device)
    intro = (
        f"{case_text(case)}. {environment_text(case.source.environment)}. Medians of "
        f"{case.rounds} rounds. Figures: {files_text([case.source])}."
    )
    return f"{_wrapped(intro)}\n\n{markdown(headline_table(case))}"


def _overview(device: Device) -> str:
    cases = list(device.cases.values())
    sources = {case.source.file: case.source for case in cases}
    intro = (
        f"All {len(cases)} cases measured on {device.name}, each beside the fastest peer that runs "
        f"there; {TIMES} GEMMs is the time over that of the bare matrix products. Figures: "
        f"{files_text(sources[file] for file in sorted(sources))}."
    )
    return f"{_wrapped(intro)}\n\n{markdown(overview_table(cases))}"


def _joined(blocks: list[str], part: str) -> str:
    if not blocks:
        raise ReportError(f"marker '{part}': there is no JSON of kind {part}")
    return "\n\n".join(blocks)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
