"""Right or wrong, for many completions at once, in processes beside this one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from opsd_train.config.errors import UserError, suggest
from opsd_train.evaluation.finding import answer_part, last_box
from opsd_train.evaluation.workers import Crew, Failure


@dataclass(frozen=True)
class Answer:
    """A completion and what decides about it.

    `task` names a reasoning_gym task, whose own scorer then grades by the task's `entry`
    ("question", "answer", "metadata") with the settings `task_config` that the entry was made
    with; without a task math-verify grades.
    """

    text: str
    expected: str
    task: str | None = None
    entry: dict[str, Any] | None = None
    task_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Grade:
    r"""Whether an answer is right.

    answer   the answer as it was found in the text; None: there is none
    boxed    it has the form asked for: a closed \boxed{...}; for a task's own scorer, an answer
    reason   why grading failed ("timeout", "error: ..."), which counts as wrong; else None
    """

    correct: bool
    answer: str | None
    boxed: bool
    reason: str | None = None


class Grader:
    r"""Grades answers in up to `workers` processes of its own, which stay until `close`.

    The answer of a completion is in what follows its last </think>, and is found there by
    `finding`: the last closed \boxed{...}, else the final number or the last lines. math-verify
    compares it with the expected one; a reasoning_gym task's own scorer takes it at score 1.

    An answer that takes longer than `seconds`, or at which its process dies, is wrong, with the
    reason; the others lose nothing. UserError: `seconds` or `workers` is not positive.
    """

    def __init__(self, *, seconds: float = 10.0, workers: int | None = None) -> None:
        if seconds <= 0:
            raise UserError(f"seconds={seconds} should be positive")
        if workers is not None and workers < 1:
            raise UserError(f"workers={workers} should be at least 1")
        self._seconds, self._workers = seconds, workers or os.cpu_count() or 1
        self._crew: Crew | None = None

    def submit(self, answers: Sequence[Answer]) -> Pending:
        """Begins to grade, and returns at once. UserError: a task is unknown or has no entry."""
        _check_tasks(answers)
        if not answers:
            return Pending(answers, ())
        if self._crew is None:
            modules = ["opsd_train.evaluation.answers"]  # brings math-verify
            modules += ["reasoning_gym"] * any(answer.task is not None for answer in answers)
            self._crew = Crew(grade_one, self._seconds, self._workers, modules)
        return Pending(answers, self._crew.submit(answers))

    def close(self) -> None:
        """Ends the processes; what is still pending fails with RuntimeError."""
        if self._crew is not None:
            self._crew.close()


@dataclass(frozen=True)
class Pending:
    """Answers that are being graded."""

    answers: Sequence[Answer]
    futures: Sequence[Future]

    def result(self) -> list[Grade]:
        """Waits for the grades, in the order of the answers."""
        results = [future.result() for future in self.futures]
        pairs = zip(self.answers, results, strict=True)
        return [_failed(a, r) if isinstance(r, Failure) else r for a, r in pairs]


def grade(
    answers: Sequence[Answer], *, seconds: float = 10.0, workers: int | None = None
) -> list[Grade]:
    """The grade of each answer, in order, by a Grader for them alone."""
    grader = Grader(seconds=seconds, workers=workers)
    try:
        return grader.submit(answers).result()
    finally:
        grader.close()


def grade_one(answer: Answer) -> Grade:
    """The grade of one answer, here and now, however long it takes."""
    from opsd_train.evaluation.answers import check, check_by_task

    if answer.task is None:
        return Grade(*check(answer.text, answer.expected))
    task = answer.task, answer.entry, answer.task_config
    return Grade(*check_by_task(answer.text, answer.expected, *task))


def _failed(answer: Answer, failure: Failure) -> Grade:
    box = last_box(answer_part(answer.text))
    return Grade(False, box or None, box is not None, failure.reason)


def _check_tasks(answers: Sequence[Answer]) -> None:
    tasks = {answer.task for answer in answers} - {None}
    if not tasks:
        return
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("a task's own scorer needs: pip install reasoning-gym") from None
    for task in sorted(tasks):
        if task not in DATASETS:
            raise UserError(f"unknown task {task!r}{suggest(task, list(DATASETS))}")
    for answer in answers:
        if answer.task is not None and answer.entry is None:  # scorers would take it for wrong
            raise UserError(f"an answer to task {answer.task!r} needs its entry")
