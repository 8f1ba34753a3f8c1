"""Greedy accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd_train.data import Problem
from opsd_train.evaluation.intervals import wilson
from opsd_train.rewards import is_correct
from opsd_train.rollout import Engine
from opsd_train.sections import EvaluationConfig


@dataclass(frozen=True)
class Evaluation:
    """One greedy completion per problem and whether it is right."""

    completions: list[list[int]]
    correct: list[bool]

    def summary(self) -> dict[str, object]:
        """Accuracy with its 95 % interval."""
        right, count = sum(self.correct), len(self.correct)
        return {
            "accuracy": right / count,
            "interval": list(wilson(right, count)),
            "correct": right,
            "problems": count,
        }


def evaluate(
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    prompts: list[list[int]],
    settings: EvaluationConfig,
) -> Evaluation:
    """Solve each problem once, greedily."""
    completions = engine.generate(
        prompts, settings.max_new_tokens, batch_size=settings.batch_size, seed=None
    )
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    correct = [is_correct(p, text) for p, text in zip(problems, texts, strict=True)]
    return Evaluation(completions, correct)
