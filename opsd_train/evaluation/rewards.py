"""Grades a run's completions in the background, while the run goes on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from opsd_train.data.batches import Sample
from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.grading import Answer, Grade, Grader, Pending

_MOST_PROCESSES = 4  # a check takes milliseconds, and each process 120 MiB


class Rewards:
    """Each rank grades its own completions and gets the grades of all ranks."""

    def __init__(self, grader: Grader, tokenizer: Any, context: DistributedContext) -> None:
        self._grader, self._tokenizer, self._context = grader, tokenizer, context

    def submit(self, problems: Sequence[Problem], completions: Sequence[list[int]]) -> Pending:
        """Start grading this rank's completions (token ids), one for each problem."""
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        return self._grader.submit(list(map(answer_of, problems, texts)))

    def collect(self, pending: Pending) -> list[Grade]:
        """The grades of all ranks: grade i is of rank i % size. Every rank calls it."""
        parts = self._context.all_gather(pending.result())
        return [grade for turn in zip_longest(*parts) for grade in turn if grade is not None]


def answer_of(problem: Problem, text: str) -> Answer:
    """A completion of a problem, ready to be graded."""
    return Answer(text, problem.answer, problem.task, problem.entry, problem.task_config)


def with_grades(samples: Sequence[Sample], grades: Sequence[Grade]) -> list[Sample]:
    """The samples with their grades."""
    return [
        replace(sample, correct=grade.correct, answer=grade.answer, check_failed=grade.reason)
        for sample, grade in zip(samples, grades, strict=True)
    ]


def failures(reasons: Sequence[str | None]) -> list[str]:
    """A warning of one line if some answers could not be checked, else none.

    `reasons`: why, for each answer; None where it was checked.
    """
    failed = Counter(reason for reason in reasons if reason is not None)
    if not failed:
        return []
    reason, _ = failed.most_common(1)[0]
    return [
        f"{failed.total()} of {len(reasons)} answers could not be checked and count as wrong: "
        f"{reason[:80]}"
    ]


def grading_processes() -> int:
    """The number of grading processes of this rank: half of its share of the cores, at most 4."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(_MOST_PROCESSES, max(1, (os.cpu_count() or 1) // ranks // 2))
