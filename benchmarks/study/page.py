"""study.html, study.md and figures/: what the study found, from its results.json alone."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.study.comparison import ACCURACY, Comparison, compare
from benchmarks.study.figures import OWN, experiment_figures, positions
from benchmarks.study.outcomes import Results, load_results
from benchmarks.study.reading import NONE, decisive, percent, ratio_readings, reading, verdict
from benchmarks.study.statistics import REPLICATES
from benchmarks.study.tables import (
    Table,
    accuracy_table,
    experiment_tables,
    main_comparison,
    memory_table,
    origin,
    page_markdown,
    unfinished,
)
from opsd_train.reporting.html import visible
from opsd_train.reporting.metrics_log import duration, replace_file
from opsd_train.reporting.plots import Picture

SVG = "data:image/svg+xml;base64,"


@dataclass(frozen=True)
class Section:
    """An experiment as the page shows it."""

    name: str
    experiment: dict[str, Any]
    readings: list[tuple[str, str]]  # (verdict, sentence)
    ratios: list[str]
    pictures: list[Picture]
    tables: list[Table]
    arms: list[tuple[str, str]]  # (label, changes)
    note: str | None
    runs: list[tuple[str, str]]  # (id, command)


def write_page(folder: Path) -> Path:
    """Reads a study's results.json, writes its page beside it, and returns the page's path.

    Raises UserError where there is no results.json, or it is not as it should be.
    """
    results = load_results(folder)
    comparisons = [compare(results, experiment) for experiment in results["experiments"]]
    main = main_comparison(comparisons)
    sections = [
        _section(results, comparison, whole=comparison is not main) for comparison in comparisons
    ]
    inside = _inside(results, comparisons)
    files = {section.name: _write(folder, section.name, section.pictures) for section in sections}
    if inside and inside["picture"]:
        _write(folder, "diagnostics", [inside["picture"]])

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["visible"] = visible
    page = environment.get_template("study.html.j2").render(
        results=results,
        origin=origin(results),
        missing=unfinished(results, comparisons),
        counts=_counts(results),
        main=accuracy_table(results, main) if main else None,
        replicates=REPLICATES,
        sections=sections,
        inside=inside,
        runs=_runs(results),
    )
    target = folder / "study.html"
    replace_file(target, page)
    replace_file(folder / "study.md", page_markdown(results, comparisons, files))
    return target


def _section(results: Results, comparison: Comparison, *, whole: bool) -> Section:
    """Not whole: without its table of accuracies, which the page opens with."""
    experiment = comparison.experiment
    tables = experiment_tables(results, comparison)[0 if whole else 1 :]
    if experiment["kind"] == "memory" and results.get("memory"):
        tables = [memory_table(results["memory"]), *tables]
    return Section(
        name=comparison.name,
        experiment=experiment,
        readings=[
            (
                verdict(decisive(comparison, contrast)[0], contrast.paper),
                reading(comparison, contrast),
            )
            for contrast in comparison.contrasts
        ],
        ratios=[line for contrast in comparison.contrasts for line in ratio_readings(contrast)],
        pictures=experiment_figures(results, comparison),
        tables=tables,
        arms=[(arm.label, ", ".join(arm.changes)) for arm in comparison.arms if arm.changes],
        note=(results.get("notes") or {}).get(comparison.name),
        runs=_commands(results, experiment),
    )


def _commands(results: Results, experiment: dict[str, Any]) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for kind in ("runs", "samplings"):
        for arm in experiment["arms"]:
            for ids in (arm.get(kind) or {}).values():
                found |= {i: results[kind][i]["command"] for i in ids if i in results[kind]}
    if experiment["kind"] == "memory" and results.get("memory"):
        found["memory"] = results["memory"]["command"]
    return list(found.items())


def _inside(results: Results, comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """The diagnostics of the runs of arm "opsd", by task; None where there are none."""
    runs = [run for run in results["runs"].values() if run["arm"] == OWN]
    tasks = [task for task in results["tasks"] if any(run["task"] == task for run in runs)]
    found = {
        task: [r["diagnostics"] for r in runs if r["task"] == task and r.get("diagnostics")]
        for task in tasks
    }
    if not any(found.values()):
        return None
    return {
        "not_ahead": _not_ahead(comparisons),
        "teachers": [_teacher_row(results, task, runs) for task in tasks],
        "picture": positions(found),
        "kinds": [row for task in tasks for row in _kind_rows(task, found[task])],
        "tokens": [(task, found[task][0]["tokens"]) for task in tasks if found[task]],
    }


def _not_ahead(comparisons: Sequence[Comparison]) -> list[str]:
    """Whom OPSD does not beat, a line a comparison on a task: its interval is not above 0."""
    main = main_comparison(comparisons)
    lines = []
    for contrast in main.contrasts if main else []:
        if contrast.first.name == OWN and contrast.measure == ACCURACY:
            tasks = [task for task, estimate in contrast.tasks.items() if estimate.low <= 0]
            if tasks:
                lines.append(f"{contrast.second.label}: on {', '.join(tasks)}")
    return lines


def _teacher_row(results: Results, task: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy of the student before and after, and of the teacher, who is shown the solution."""
    own = [run for run in runs if run["task"] == task and run["status"] == "finished"]
    evaluations = [run["evaluations"] for run in own if run["evaluations"]]
    before = [rows[0]["accuracy"] for rows in evaluations if rows[0]["step"] == 0]
    after = [rows[-1]["accuracy"] for rows in evaluations]
    cells = [percent(sum(values) / len(values)) if values else NONE for values in (before, after)]
    teacher = next((run["teacher"] for run in runs if run["task"] == task and run["teacher"]), None)
    shown = NONE
    if teacher:
        low, high = teacher["interval"]
        shown = f"{percent(teacher['accuracy'])} [{percent(low)}, {percent(high)}]"
    majority = results["tasks"][task].get("majority")
    return [task, cells[0], shown, cells[1], percent(majority["accuracy"]) if majority else NONE]


def _kind_rows(task: str, diagnostics: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Shares of tokens and of divergence by kind, means over seeds: start and end of the runs."""
    rows = []
    for part, label in (("start", "first quarter"), ("end", "last quarter")):
        shares = [one["kinds"][part] for one in diagnostics]
        shares = [share for share in shares if share["of_divergence"]]
        if not shares:
            continue
        cells = [
            percent(sum(share[of][kind] for share in shares) / len(shares))
            for kind in ("style", "task", "end")
            for of in ("of_tokens", "of_divergence")
        ]
        rows.append([task, label, *cells, f"{sum(share['count'] for share in shares):,}"])
    return rows


def _counts(results: Results) -> list[tuple[str, str, str]]:
    """The cards on top: (label, value, remark)."""
    runs = list(results["runs"].values())
    asked = {
        run
        for experiment in results["experiments"]
        for arm in experiment["arms"]
        for ids in (arm.get("runs") or {}).values()
        for run in ids
    }
    done = [run for run in runs if run["status"] == "finished"]
    problems = sorted({task["problems"] for task in results["tasks"].values()})
    seeds = sorted({run["seed"] for run in runs})
    tokens = sum(run["tokens"] or 0 for run in done)
    return [
        (
            "Runs finished",
            f"{len(done)} of {len(asked | results['runs'].keys())}",
            f"seeds {', '.join(map(str, seeds))}",
        ),
        (
            "Held-out problems",
            " to ".join(f"{count:,}" for count in dict.fromkeys((problems[0], problems[-1]))),
            f"of each of {len(results['tasks'])} tasks",
        ),
        (
            "Compute",
            duration(results["seconds"]),
            f"of training runs, summed; {tokens:,} tokens generated",
        ),
    ]


def _runs(results: Results) -> list[list[str]]:
    """Every run: what it was, how it ended, what it took."""
    rows = []
    for name, run in results["runs"].items():
        done = run["status"] == "finished"
        rows.append(
            [
                name,
                f"{run['status']}: {run['error']}" if run.get("error") else run["status"],
                percent(run["evaluations"][-1]["accuracy"])
                if done and run["evaluations"]
                else NONE,
                f"{run['steps']:,}" if run["steps"] else NONE,
                f"{run['tokens']:,}" if run["tokens"] else NONE,
                duration(run["seconds"]["total"]) if run["seconds"] else NONE,
                run["command"],
            ]
        )
    return rows


def _write(folder: Path, name: str, pictures: Sequence[Picture]) -> list[str]:
    """The pictures as files of figures/; their names."""
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    files = []
    for picture in pictures:
        file = f"{name}-{picture.title.lower().replace(' ', '-').replace('@', '-at-')}.svg"
        text = base64.b64decode(picture.source.removeprefix(SVG)).decode()
        replace_file(target / file, text)
        files.append(file)
    return files
