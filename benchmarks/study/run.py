"""Run the study, from its recipes to its page; finished runs are kept, others are resumed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.study.base import copy_words, unpacked
from benchmarks.study.collect import as_text, collect, summary_of
from benchmarks.study.earlier import Earlier
from benchmarks.study.page import write_page
from benchmarks.study.plan import Plan, PlannedExperiment, fingerprint, make_plan
from benchmarks.study.settings import load_experiments, load_shared
from benchmarks.study.step_memory import measure
from benchmarks.study.subprocesses import BUSY, Subprocess, run_subprocesses
from opsd_train.config.errors import UserError, suggest
from opsd_train.reporting.metrics_log import duration, replace_file


def study(
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    jobs: int | None = None,
    output_dir: str | None = None,
    earlier: str | None = None,
) -> int:
    """Run what the study still needs, write its results and page; returns the exit code.

    Runs are separate processes, `jobs` at a time (default: 2 on a CPU, 4 on a GPU). A run that
    fails does not stop the others; the next call tries it again. `earlier`, a results.json: what is
    finished there is not run. Raises UserError for an unknown experiment, or a folder with runs of
    other settings.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shared = load_shared()
    experiments = load_experiments(shared)
    for name in only:
        if name not in experiments:
            near = suggest(name, list(experiments)) or f"; there are {', '.join(experiments)}"
            raise UserError(f"--only {name}: there is no such experiment{near}")
    folder = Path(output_dir or shared.output_dir + ("-quick" if quick else ""))
    plan = make_plan(shared, experiments, folder, quick=quick)
    _keep_plan(plan)
    done = Earlier.read(Path(earlier) if earlier else None)
    wanted = [planned for planned in plan.experiments if not only or planned.name in only]
    if any(planned.experiment.kind == "memory" for planned in wanted):
        measure(plan.size.memory_tokens, folder)  # before the runs: nothing else may run meanwhile
    count = jobs or (4 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
    failures = _run(plan, wanted, count, done.without(_weights_needed(plan, wanted, done)))
    results = collect(plan, "quick" if quick else "full", done)
    replace_file(folder / "results.json", as_text(results))
    print(write_page(folder))
    for name, log in failures.items():
        print(f"failed: {name}, see {log}; the same command tries it again", file=sys.stderr)
    return 1 if failures else 0


def _weights_needed(plan: Plan, wanted: Sequence[PlannedExperiment], earlier: Earlier) -> set[str]:
    """Runs whose weights a wanted sampling still needs."""
    asked = [plan.samplings[i] for i in plan.needed(wanted) if i in plan.samplings]
    missing = [sampled for sampled in asked if not earlier.sampling(sampled, plan)]
    return {name for s in missing for name in (s.run, s.problems_of) if name}


def _run(
    plan: Plan, wanted: Sequence[PlannedExperiment], count: int, earlier: Earlier
) -> dict[str, Path]:
    """Run what these experiments need and is not finished; returns the failed runs' logs by id."""
    needed = plan.needed(wanted)
    jobs, failures = _jobs(plan, needed, earlier), {}
    if jobs:
        kept = len(needed) - len(jobs)
        print(f"{plan.folder}: {len(jobs)} runs, {kept} are finished already; {count} at a time")
    for number, ended in enumerate(run_subprocesses(jobs, count), 1):
        name = ended.job.id
        failed = "is still run by an earlier study" if ended.code == BUSY else "FAILED"
        how = "finished" if ended.code == 0 else f"{failed} ({ended.code})"
        print(f"{number}/{len(jobs)}  {name} {how}, {duration(ended.seconds)}", flush=True)
        if ended.code:
            failures[name] = ended.job.log
        elif name in plan.runs:  # the trained weights are saved besides
            shutil.rmtree(plan.runs[name].folder / "checkpoints", ignore_errors=True)
    return failures


def _jobs(plan: Plan, needed: set[str], earlier: Earlier) -> list[Subprocess]:
    """The needed runs that are not finished, in the plan's order, then the samplings."""
    logs = plan.folder / "logs"
    jobs = []
    for run in plan.runs.values():
        ended = (summary_of(run) or {}).get("status") == "finished" or earlier.run(run)
        if run.id in needed and not ended:
            argv = [*run.words, *copy_words(run.config.model, plan.folder), "--resume"]
            jobs.append(Subprocess(run.id, argv, logs / f"{run.id}.txt"))
    missing = {job.id for job in jobs}
    for sampled in plan.samplings.values():
        ended = (sampled.folder / "scores.json").exists() or earlier.sampling(sampled, plan)
        if sampled.id in needed and not ended:
            needs = frozenset({sampled.problems_of, sampled.run or sampled.problems_of}) & missing
            model = plan.runs[sampled.problems_of].config.model
            argv = sampled.words(unpacked(model, plan.folder))
            jobs.append(Subprocess(sampled.id, argv, logs / f"{sampled.id}.txt", needs))
    return jobs


def _keep_plan(plan: Plan) -> None:
    """Save each run's settings; raise UserError if they differ from those saved earlier."""
    folder = plan.folder / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    for run in plan.runs.values():
        path, text = folder / f"{run.id}.yaml", fingerprint(run.config)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path} has other settings than {run.id} has now; continue in another folder: "
                "--out ..."
            )
        replace_file(path, text)
