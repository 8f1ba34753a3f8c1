"""The verdicts of a run's completions, graded in the background while the run goes on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opsd_train.data.batches import Sample
from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.grading import Answer, Grade, Grader, Pending, grade_one

_MOST_PROCESSES = 4  # a check takes milliseconds, and each process 120 MiB


class Rewards:
    """Every rank grades its own completions; every rank knows all the grades."""

    def __init__(self, grader: Grader, tokenizer: Any, context: DistributedContext) -> None:
        self._grader, self._tokenizer, self._context = grader, tokenizer, context

    def submit(self, problems: Sequence[Problem], completions: Sequence[list[int]]) -> Pending:
        """Begins to grade this rank's completions (token ids), one for each problem."""
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        return self._grader.submit(list(map(answer_of, problems, texts)))

    def collect(self, pending: Pending) -> list[Grade]:
        """The grades of all ranks, which took turns: number i is of rank i % size."""
        parts = self._context.all_gather(pending.result())
        grades: list[Grade] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            grades[rank :: self._context.size] = part
        return grades


def is_correct(problem: Problem, text: str) -> bool:
    """Whether one completion is right, checked here and now, without a time limit."""
    return grade_one(answer_of(problem, text)).correct


def answer_of(problem: Problem, text: str) -> Answer:
    """A completion of a problem, for its check."""
    return Answer(text, problem.answer, problem.task, problem.entry, problem.task_config)


def with_grades(samples: Sequence[Sample], grades: Sequence[Grade]) -> list[Sample]:
    """The samples with their verdicts."""
    return [
        replace(sample, correct=grade.correct, answer=grade.answer, check_failed=grade.reason)
        for sample, grade in zip(samples, grades, strict=True)
    ]


def failures(reasons: Sequence[str | None]) -> list[str]:
    """A line about the checks that failed, if any did; of each answer the reason, or None."""
    failed = Counter(reason for reason in reasons if reason is not None)
    if not failed:
        return []
    reason, _ = failed.most_common(1)[0]
    return [
        f"{failed.total()} of {len(reasons)} answers could not be checked and count as wrong: "
        f"{reason[:80]}"
    ]


def grading_processes() -> int:
    """How many processes grade for this one: half of its share of the cores, at most four."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(_MOST_PROCESSES, max(1, (os.cpu_count() or 1) // ranks // 2))
