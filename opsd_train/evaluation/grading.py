"""Right or wrong, for many completions at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd_train.config import suggest
from opsd_train.errors import UserError
from opsd_train.evaluation.workers import Failure, run_each


@dataclass(frozen=True)
class Answer:
    """A completion and what decides about it.

    `task` names a reasoning_gym task, whose own scorer then grades by the task's `entry`
    ("question", "answer", "metadata"); without a task math-verify does.
    """

    text: str
    expected: str
    task: str | None = None
    entry: dict[str, Any] | None = None


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


def grade(
    answers: Sequence[Answer], *, seconds: float = 10.0, workers: int | None = None
) -> list[Grade]:
    r"""The grade of each answer, in order. Uses `workers` processes (default: one per CPU).

    The answer of a completion is in what follows its last </think>, if anything does: the last
    closed \boxed{...} there, else what math-verify finds in the last 10,000 characters. A boxed
    answer of more than 10,000 characters is right only if its text is that of the expected one.
    A reasoning_gym task's answer is found by `rewards.extract_answer` and right at score 1.

    An answer that takes longer than `seconds`, or at which its process dies, is wrong, with the
    reason; the others lose nothing. UserError: math-verify is missing, a task is unknown, or one
    has no entry.
    """
    if seconds <= 0:
        raise UserError(f"seconds={seconds} should be positive")
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} should be at least 1")
    _check_tasks(answers)
    try:
        from opsd_train.evaluation.answers import answer_part, last_box
    except ModuleNotFoundError as error:
        raise UserError(f"grading needs {error.name}: pip install 'opsd[eval]'") from None
    count = workers or os.cpu_count() or 1
    grades = run_each(grade_one, answers, seconds, count)
    for index, result in enumerate(grades):
        if isinstance(result, Failure):
            box = last_box(answer_part(answers[index].text))
            grades[index] = Grade(False, box or None, box is not None, result.reason)
    return grades


def grade_one(answer: Answer) -> Grade:
    """The grade of one answer, here and now, however long it takes."""
    from opsd_train.evaluation.answers import check, check_by_task

    if answer.task is None:
        return Grade(*check(answer.text, answer.expected))
    return Grade(*check_by_task(answer.text, answer.expected, answer.task, answer.entry))


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
