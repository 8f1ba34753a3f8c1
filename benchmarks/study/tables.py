"""The study in Markdown: its tables, and the summary in docs/benchmarks.md.

<!-- study -->
anything here is replaced
<!-- /study -->
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.study.comparison import ArmResult, Comparison, compare
from benchmarks.study.long_runs import signals_table
from benchmarks.study.outcomes import Results
from benchmarks.study.reading import (
    NONE,
    decisive,
    difference_text,
    pair_text,
    percent,
    ratio_readings,
    ratio_summary,
    reading,
    share_text,
)
from benchmarks.study.statistics import Measured
from benchmarks.study.tuning import KIND, tuning_table
from opsd_train.config.errors import UserError
from opsd_train.reporting.metrics_log import duration

MAIN = "Table 2"
_PART = re.compile(r"<!-- study -->\n.*?<!-- /study -->", re.DOTALL)
_WIDTH = 110

Table = tuple[list[str], list[list[str]]]


def rewrite(text: str, results: Results) -> str:
    """A page with its study part written again from the results.

    Raises UserError unless it has the part once.
    """
    parts = _PART.findall(text)
    if len(parts) != 1:
        raise UserError(
            f"the page has {len(parts)} parts from '<!-- study -->' to '<!-- /study -->'; "
            "it needs one"
        )
    block = f"<!-- study -->\n\n{summary(results)}\n\n<!-- /study -->"
    return _PART.sub(lambda _: block, text)


def summary(results: Results) -> str:
    """The main table, where it comes from, and the other experiments' contrasts, a line each."""
    comparisons = [compare(results, experiment) for experiment in results["experiments"]]
    main = main_comparison(comparisons)
    lines = [markdown(accuracy_table(results, main)), ""] if main else []
    lines += _wrapped(f"Held-out accuracy in percent, greedy, [95 % interval]. {_origin(results)}")
    missing = unfinished(results, comparisons)
    if missing:
        lines += ["", *_wrapped(missing)]
    items = [*map(_experiment_line, comparisons), _memory_line(results)]
    lines.append("")
    for item in filter(None, items):
        first, *rest = textwrap.wrap(item, _WIDTH - 2, break_on_hyphens=False)
        lines += [f"- {first}", *(f"  {more}" for more in rest)]
    return "\n".join(lines)


def page_markdown(
    results: Results, comparisons: Sequence[Comparison], pictures: dict[str, list[str]]
) -> str:
    """study.md: every experiment; pictures: file names by experiment."""
    lines = [
        f"# OPSD and its neighbours on a small model: the {results['name']} study",
        "",
        *_wrapped(_origin(results)),
    ]
    missing = unfinished(results, comparisons)
    lines += ["", *_wrapped(missing)] if missing else []
    for comparison in comparisons:
        experiment = comparison.experiment
        lines += ["", f"## {experiment['title']}", ""]
        lines += [*_wrapped(experiment["question"]), ""]
        lines += [*_wrapped(f"The paper ({experiment['paper']}): {experiment['paper_says']}"), ""]
        lines += [f"Command: `{experiment['command']}`"]
        for file in pictures.get(comparison.name, []):
            lines += ["", f"![{file.removesuffix('.svg')}](figures/{file})"]
        if experiment["kind"] == "memory" and results.get("memory"):
            lines += ["", markdown(memory_table(results["memory"]))]
        for table in experiment_tables(results, comparison):
            lines += ["", markdown(table)]
        found = readings(comparison)
        lines += ["", *(f"- {line}" for line in found)] if found else []
        note = (results.get("notes") or {}).get(comparison.name)
        lines += ["", *_wrapped(note)] if note else []
    return "\n".join(lines) + "\n"


def main_comparison(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The one of the paper's Table 2, if it was asked for."""
    return next((c for c in comparisons if c.experiment["paper"] == MAIN), None)


def accuracy_table(results: Results, comparison: Comparison) -> Table:
    """Arms by tasks: final accuracy with its interval, and the tasks' average."""
    several = len(comparison.tasks) > 1
    header = ["", *comparison.tasks, *(["average"] if several else [])]
    rows = []
    for arm in comparison.arms:
        cells = [_share(arm.final.get(task)) for task in comparison.tasks]
        cells += [share_text(comparison.overall(arm.final))] if several else []
        rows.append([arm.label, *cells])
    majority = [_majority(results["tasks"][task]) for task in comparison.tasks]
    if any(cell != NONE for cell in majority):
        rows.append(["always the most frequent answer", *majority, *([NONE] if several else [])])
    return header, rows


def cost_table(comparison: Comparison) -> Table:
    """Arms by best and mean over checkpoints, and what their runs took."""
    header = [
        "",
        "best checkpoint",
        "mean of checkpoints",
        "runs",
        "tokens of a run",
        "time of a run without evaluations",
        "peak memory",
    ]
    rows = []
    for arm in comparison.arms:
        if not arm.finished and not arm.unfinished:
            continue
        cost = arm.cost
        rows.append(
            [
                arm.label,
                share_text(comparison.overall(arm.best)),
                share_text(comparison.overall(arm.mean)),
                _runs(arm),
                f"{cost['tokens']:,.0f}" if cost else NONE,
                duration(cost["seconds"]) if cost else NONE,
                f"{cost['memory']:,.0f} MiB" if cost.get("memory") else NONE,
            ]
        )
    return header, rows


def contrast_table(comparison: Comparison) -> Table:
    """Contrasts by tasks, in points."""
    several = len(comparison.tasks) > 1
    header = ["first minus second", *comparison.tasks, *(["average"] if several else [])]
    rows = [
        [
            pair_text(contrast),
            *(difference_text(contrast.tasks.get(task)) for task in comparison.tasks),
            *([difference_text(contrast.total)] if several else []),
        ]
        for contrast in comparison.contrasts
    ]
    return header, rows


def passk_table(comparison: Comparison) -> Table:
    """Arms by pass@1 and pass@k for the largest k, averaged over tasks."""
    most = min((len(p) for arm in comparison.arms for p in arm.passed.values()), default=0)
    ks = sorted({1, most})
    rows = []
    for arm in comparison.arms:
        at = [comparison.overall({t: v[k - 1] for t, v in arm.passed.items()}) for k in ks]
        rows.append([arm.label, *map(share_text, at)])
    return ["", *(f"pass@{k}" for k in ks)], rows


def memory_table(memory: dict[str, Any]) -> Table:
    """Tokens by method, in MiB; predicted values say so."""
    cells: dict[int, dict[str, str]] = {}
    for point in sorted(memory["points"], key=lambda point: point["tokens"]):
        text = f"{point['mib']:,.0f}" + (" (predicted)" if point["predicted"] else "")
        cells.setdefault(point["tokens"], {})[point["method"]] = text
    rows = [
        [f"{tokens:,}", row.get("plain", NONE), row.get("ours", NONE)]
        for tokens, row in cells.items()
    ]
    return ["tokens of the step", "plain logits, MiB", "opsd_kernels, MiB"], rows


def measured_memory(results: Results) -> tuple[int, float, float] | None:
    """The most tokens at which both were measured, and the MiB of plain logits and of ours."""
    measured = [p for p in (results["memory"] or {"points": []})["points"] if not p["predicted"]]
    by_method = {
        method: {p["tokens"]: p["mib"] for p in measured if p["method"] == method}
        for method in ("plain", "ours")
    }
    both = by_method["plain"].keys() & by_method["ours"].keys()
    return (max(both), *(by_method[m][max(both)] for m in ("plain", "ours"))) if both else None


def experiment_tables(results: Results, comparison: Comparison) -> list[Table]:
    """The tables of an experiment that have rows."""
    if not comparison.tasks:
        return []
    kind = comparison.experiment["kind"]
    if kind == KIND:
        return [tuning_table(results)]
    found = [accuracy_table(results, comparison), cost_table(comparison)]
    if any(arm.passed for arm in comparison.arms):
        found.append(passk_table(comparison))
    if kind == "collapse":
        found.insert(0, signals_table(results, comparison))
    found.append(contrast_table(comparison))
    return [table for table in found if table[1]]


def readings(comparison: Comparison) -> list[str]:
    """All contrasts of an experiment in words, and the token ratios."""
    lines = []
    for contrast in comparison.contrasts:
        lines.append(reading(comparison, contrast))
        lines += [f"Tokens, {line}" for line in ratio_readings(contrast)]
    return lines


def origin(results: Results) -> str:
    """Device, versions, commit, date and the time it took, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = f"commit {results['commit']}, " if results["commit"] else ""
    spent = duration(results["seconds"])
    return f"{results['device']}, {versions}, {commit}{results['date']}, {spent} of compute"


def unfinished(results: Results, comparisons: Sequence[Comparison]) -> str:
    """Which runs and samplings are failed or missing; empty where none is."""
    asked = dict.fromkeys(
        i for c in comparisons for arm in c.arms for i in [*arm.unfinished, *arm.unsampled]
    )
    if not asked:
        return ""
    known = results["runs"] | results["samplings"]
    failed = [i for i in asked if known.get(i, {}).get("status") == "failed"]
    missing = [i for i in asked if i not in failed]
    parts = [
        f"{len(ids)} {what} ({', '.join(ids)})"
        for what, ids in (("failed", failed), ("missing", missing))
        if ids
    ]
    return f"Not all runs are there: {'; '.join(parts)}. The figures are of the others."


def markdown(table: Table) -> str:
    header, rows = table
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([_row(header), rule, *map(_row, rows)])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _experiment_line(comparison: Comparison) -> str:
    """The contrasts' differences, in points, and the ratio of tokens; empty without a contrast."""
    parts = []
    for contrast in comparison.contrasts:
        estimate, where = decisive(comparison, contrast)
        suffix = f" ({where})" if where.endswith("only") else ""
        numbers = difference_text(estimate) if estimate else "not on all tasks"
        parts.append(f"{pair_text(contrast)} {numbers}{suffix}")
        parts += [ratios] if (ratios := ratio_summary(contrast)) else []
    title = f"{comparison.experiment['title']} ({comparison.experiment['paper']})"
    return f"{title}, points: {'; '.join(parts)}." if parts else ""


def _memory_line(results: Results) -> str:
    found = measured_memory(results)
    if found is None:
        return ""
    tokens, plain, ours = found
    return (
        f"Peak memory of a full-vocabulary step of {tokens:,} tokens: {plain:,.0f} MiB with plain "
        f"logits, {ours:,.0f} MiB with opsd_kernels."
    )


def _origin(results: Results) -> str:
    return f"{origin(results)}; `{results['command']}`."


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _share(measured: Measured | None) -> str:
    return share_text(measured.estimate() if measured else None)


def _majority(task: dict[str, Any]) -> str:
    return percent(task["majority"]["accuracy"]) if task.get("majority") else NONE


def _runs(arm: ArmResult) -> str:
    if not arm.unfinished:
        return str(arm.finished)
    return f"{arm.finished}, {len(arm.unfinished)} not finished"
