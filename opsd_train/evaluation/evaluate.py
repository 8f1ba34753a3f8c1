"""Runs an evaluation: completions, grades, scores. A second call continues an unfinished one."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.evaluation.grading import Answer, grade
from opsd_train.evaluation.scores import GradedSample, compare, rows, summarise
from opsd_train.evaluation.sets import HUB, load_set, set_label
from opsd_train.evaluation.settings import EvalConfig, GradingConfig
from opsd_train.evaluation.store import Evaluated, Store
from opsd_train.reporting.metrics_log import duration

Scores = dict[str, Any]  # by set
_SECONDS_BETWEEN_LINES = 30.0


def evaluate(config: EvalConfig, source: str, sets: Sequence[str]) -> Scores:
    """Evaluate a model or run on sets of problems; returns the scores of each set.

    What config.output_dir has of this evaluation is kept. Under torchrun each rank generates its
    share; only rank 0 grades, and the others return {}. Raises UserError for a set that is unknown
    or named twice, and where the folder holds another evaluation.
    """
    # Imported here because --regrade needs neither torch nor a model.
    from transformers.utils import logging as transformers_logging

    from opsd_train.distributed.context import init_distributed
    from opsd_train.evaluation.eval_prompts import EvalPrompts
    from opsd_train.evaluation.generate import generate, patient_barrier
    from opsd_train.evaluation.source import find_source
    from opsd_train.model.policy import load_tokenizer

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    labels = list(map(set_label, sets))
    if len(set(labels)) < len(labels):
        raise UserError(f"--set has a set twice: {', '.join(labels)}")
    context, store = init_distributed(config.model.device), Store(config.output_dir)
    found = find_source(source, config.model)
    prompts = EvalPrompts(load_tokenizer(found.model), config, sets, found.run)
    evaluated = Evaluated(source, found.weights_name, list(sets), config)
    if context.is_main:
        _open(store, evaluated, prompts, found.run)
    wait_for_all = patient_barrier(context)
    with _Progress(store.folder, shown=context.is_main) as progress:
        generate(config, found, store, prompts, context, progress.show)
    wait_for_all()
    if context.is_main:
        shutil.rmtree(store.folder / "scratch", ignore_errors=True)
    scores = score(store, config.grading) if context.is_main else {}
    context.shutdown()
    return scores


def score(store: Store, grading: GradingConfig) -> Scores:
    """Grade the completions in the folder, write grades.jsonl and scores.json, print the scores.

    Raises UserError where the folder has no completions.
    """
    problems = {(p.set, p.problem): p for p in store.problems()}
    order = {key: index for index, key in enumerate(problems)}
    kept = sorted(store.generations().items(), key=lambda item: (order[item[0][:2]], item[0][2]))
    made = [row for _, row in kept]
    if not made:
        raise UserError(f"{store.folder} has no generations to grade")
    asked = [problems[row["set"], row["problem"]] for row in made]
    answers = [
        Answer(row["text"], problem.answer, problem.task, problem.entry, problem.task_config)
        for row, problem in zip(made, asked, strict=True)
    ]
    grades = grade(answers, seconds=grading.seconds, workers=grading.workers)
    graded = [
        GradedSample(
            set=row["set"],
            problem=row["problem"],
            sample=row["sample"],
            correct=result.correct,
            answer=result.answer,
            boxed=result.boxed,
            finished=row["finished"],
            tokens=row["tokens"],
            reason=result.reason,
        )
        for row, result in zip(made, grades, strict=True)
    ]
    store.write_grades(graded)
    scores = {name: summarise(samples) for name, samples in _by_problem(graded).items()}
    store.write_scores(scores)
    for name, summary in scores.items():
        _print_scores(name, summary)
    failed = sum(sample["reason"] is not None for sample in graded)
    if failed:
        print(f"{failed} answers could not be graded and count as wrong: grades.jsonl, reason")
    print(store.folder)
    return scores


def regrade(config: EvalConfig, source: str) -> Path:
    """Grade the completions of an evaluation again; returns its folder.

    `source` is that folder, or the model or run it evaluated (the folder is then output_dir).
    Raises UserError if neither is the folder of an evaluation.
    """
    store = Store(source)
    if not store.exists:
        store = Store(config.output_dir)
    if not store.exists:
        raise UserError(
            f"--regrade: neither {source} nor {store.folder} is the folder of an evaluation; name "
            "its folder"
        )
    score(store, config.grading)
    return store.folder


def print_difference(folder: str | Path, other: str | Path) -> dict[str, dict[str, Any]]:
    """Print and return the difference in avg@n to another evaluation, by set (see `compare`).

    Only problems that both evaluations have count. Raises UserError if there are none.
    """
    ours, theirs = _by_question(Store(folder)), _by_question(Store(other))
    differences = {}
    for name in dict.fromkeys(label for label, _ in ours):
        shared = [key for key in ours if key[0] == name and key in theirs]
        if not shared:
            continue
        found = compare([theirs[key] for key in shared], [ours[key] for key in shared])
        differences[name] = found
        low, high = (100 * bound for bound in found["interval"])
        print(
            f"{name}: {100 * found['difference']:+.1f} points against {other} "
            f"(95% {low:+.1f} to {high:+.1f}; {found['problems']} problems of both)"
        )
    if not differences:
        raise UserError(f"--against {other}: no problem of {folder} is in it")
    return differences


def _open(store: Store, evaluated: Evaluated, prompts: Any, run: Config | None) -> None:
    """Begin the folder, or check that it holds this evaluation already."""
    if store.exists:
        store.check_same(evaluated)
        return
    problems = [p for name in evaluated.sets for p in load_set(name, evaluated.settings, run)]
    store.begin(evaluated, prompts.fitting(problems))


def _by_problem(graded: Sequence[GradedSample]) -> dict[str, list[list[GradedSample]]]:
    """The samples of each problem, by set."""
    sets: dict[str, dict[str, list[GradedSample]]] = defaultdict(lambda: defaultdict(list))
    for sample in graded:
        sets[sample["set"]][sample["problem"]].append(sample)
    return {name: list(problems.values()) for name, problems in sets.items()}


def _by_question(store: Store) -> dict[tuple[str, str], list[GradedSample]]:
    """The samples of each problem, by set and question: ids may differ between evaluations."""
    questions = {(p.set, p.problem): (p.set, p.question) for p in store.problems()}
    samples: dict[tuple[str, str], list[GradedSample]] = defaultdict(list)
    for row in store.grades():
        key = questions[row["set"], row["problem"]]
        samples[key].append({**row, "problem": key[1]})
    return samples


def _print_scores(name: str, summary: dict[str, Any]) -> None:
    note = f" ({HUB[name].note})" if name in HUB and HUB[name].note else ""
    title = f"{name}: {summary['problems']} problems, {summary['samples']} samples of each{note}"
    table = Table("", "score", "95% interval", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(summary):
        table.add_row(*row)
    Console().print(table)


class _Progress:
    """A bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, folder: Path, *, shown: bool) -> None:
        self._console, self._folder, self._shown = Console(), folder, shown
        self._bar: Progress | None = None
        self._started = self._told = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._shown:
            print(f"evaluation folder {self._folder}", flush=True)
        if self._shown and self._console.is_terminal:
            columns = (TextColumn("completions"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """`done` of this process's `total` completions are made."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
        elif self._shown and (done == total or self._due()):
            spent = duration(time.monotonic() - self._started)
            print(f"{done} of {total} completions, {spent}", flush=True)

    def _due(self) -> bool:
        due = time.monotonic() - self._told > _SECONDS_BETWEEN_LINES
        self._told = time.monotonic() if due else self._told
        return due
