"""Held-out problems are answered under the prompt that an evaluation names, on every rank."""

from types import SimpleNamespace

import pytest
import torch

from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.grading import Grade
from opsd_train.evaluation.heldout import HeldOut
from opsd_train.rollout import Completion

PROBLEMS = [Problem(f"p{n}", f"question {n}", str(n), str(n)) for n in range(3)]
PROMPTS = SimpleNamespace(
    student=lambda problem: [1, int(problem.answer)],
    teacher=lambda problem: [2, int(problem.answer)],
)


@pytest.mark.parametrize(("side", "mark"), [("student", 1), ("teacher", 2)])
def test_the_named_prompt_is_answered(side: str, mark: int) -> None:
    asked: list[tuple[list[list[int]], int]] = []

    def greedy(prompts: list[list[int]], max_new_tokens: int) -> list[Completion]:
        asked.append((prompts, max_new_tokens))
        return [Completion([10 + prompt[1]], [], True) for prompt in prompts]

    def collect(submitted: tuple[list[Problem], list[list[int]]]) -> list[Grade]:
        problems, tokens = submitted
        return [
            Grade(tokens[n] == [10] and problem.id == "p0", None, False)
            for n, problem in enumerate(problems)
        ]

    heldout = HeldOut(
        SimpleNamespace(evaluation=SimpleNamespace(max_new_tokens=5)),
        PROBLEMS,
        PROMPTS,
        SimpleNamespace(greedy=greedy),
        None,
        SimpleNamespace(submit=lambda problems, tokens: (problems, tokens), collect=collect),
        DistributedContext(torch.device("cpu")),
    )
    made = heldout.evaluate(side)
    assert asked == [([[mark, 0], [mark, 1], [mark, 2]], 5)]
    assert made.completions == [[10], [11], [12]]
    assert made.correct == [True, False, False]
