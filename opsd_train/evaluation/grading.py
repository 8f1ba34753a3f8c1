"""Grades completions right or wrong in worker processes."""

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
    """A completion, and what it is graded by.

    Without a `task` math-verify compares it with `expected`. `task` names a reasoning_gym task:
    its own scorer then grades by the problem's `entry` ("question", "answer", "metadata"), with
    the settings `task_config` that the entry was made with.
    """

    text: str
    expected: str
    task: str | None = None
    entry: dict[str, Any] | None = None
    task_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Grade:
    r"""Whether an answer is right.

    answer   the answer found in the text; None if there is none
    boxed    whether it has the form asked for: a closed \boxed{...}, or with a task any answer
    reason   why grading failed ("timeout", "error: ..."), which counts as wrong; else None
    """

    correct: bool
    answer: str | None
    boxed: bool
    reason: str | None = None


class Grader:
    r"""Grades answers in up to `workers` processes (None: one a core), which stay until `close`.

    The answer of a completion is looked for after its last </think>: the last closed \boxed{...},
    else the final number or the last lines (see `finding`). It is right if math-verify finds it
    equal to the expected one, or if the reasoning_gym task's own scorer gives it a score of 1.

    An answer that takes longer than `seconds`, or whose process dies, is wrong, with the reason;
    other answers are not affected. Raises UserError if `seconds` or `workers` is not positive.
    """

    def __init__(self, *, seconds: float = 10.0, workers: int | None = None) -> None:
        if seconds <= 0:
            raise UserError(f"seconds={seconds} should be positive")
        if workers is not None and workers < 1:
            raise UserError(f"workers={workers} should be at least 1")
        self._seconds, self._workers = seconds, workers or os.cpu_count() or 1
        self._crew: Crew | None = None

    def submit(self, answers: Sequence[Answer]) -> Pending:
        """Start grading and return at once.

        Raises UserError for an unknown task, an answer to a task without its entry, and a task
        where reasoning_gym is not installed.
        """
        _check_tasks(answers)
        if not answers:
            return Pending(answers, ())
        if self._crew is None:
            modules = ["opsd_train.evaluation.answers"]  # brings math-verify
            modules += ["reasoning_gym"] * any(answer.task is not None for answer in answers)
            self._crew = Crew(grade_one, self._seconds, self._workers, modules)
        return Pending(answers, self._crew.submit(answers))

    def close(self) -> None:
        """End the processes; results still pending raise RuntimeError."""
        if self._crew is not None:
            self._crew.close()


@dataclass(frozen=True)
class Pending:
    """Answers that are being graded."""

    answers: Sequence[Answer]
    futures: Sequence[Future]

    def result(self) -> list[Grade]:
        """Wait for the grades, in the order of the answers.

        Raises RuntimeError if the grader was closed, or if its processes cannot start.
        """
        results = [future.result() for future in self.futures]
        pairs = zip(self.answers, results, strict=True)
        return [_failed(a, r) if isinstance(r, Failure) else r for a, r in pairs]


def grade(
    answers: Sequence[Answer], *, seconds: float = 10.0, workers: int | None = None
) -> list[Grade]:
    """The grade of each answer, in order, by a Grader of its own; see there for what is raised."""
    grader = Grader(seconds=seconds, workers=workers)
    try:
        return grader.submit(answers).result()
    finally:
        grader.close()


def grade_one(answer: Answer) -> Grade:
    """The grade of one answer, in this process and without a time limit."""
    from opsd_train.evaluation.answers import check, check_by_task

    if answer.task is None:
        return Grade(*check(answer.text, answer.expected))
    task = answer.task, answer.entry, answer.task_config
    return Grade(*check_by_task(answer.text, answer.expected, *task))


def _failed(answer: Answer, failure: Failure) -> Grade:
    box = last_box(answer_part(answer.text))
    return Grade(False, box or None, box is not None, failure.reason)


def _check_tasks(answers: Sequence[Answer]) -> None:
    tasks = {answer.task for answer in answers if answer.task is not None}
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
