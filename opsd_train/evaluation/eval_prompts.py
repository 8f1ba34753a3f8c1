"""The prompts of an evaluation: from its own template, or as the run of a held-out set has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_train.config.schema import Config
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import PromptBuilder
from opsd_train.evaluation.sets import EvalProblem, is_heldout, recipe_of, set_label
from opsd_train.evaluation.settings import EvalConfig


class EvalPrompts:
    """Prompts as token ids, for the problems of the named sets.

    `run` is the recipe of the run that is evaluated, None for a model. Raises UserError for a
    template that does not compile, and for "heldout" without a run.
    """

    def __init__(
        self, tokenizer: Any, config: EvalConfig, names: Sequence[str], run: Config | None
    ) -> None:
        self.tokenizer = tokenizer
        self._builders: dict[str, PromptBuilder] = {}  # by the set's label
        for name in names:
            heldout = is_heldout(name)
            prompts = recipe_of(name, run).prompts if heldout else config.prompts.for_builder()
            self._builders[set_label(name)] = PromptBuilder(tokenizer, prompts)

    def fitting(self, problems: Sequence[EvalProblem]) -> list[EvalProblem]:
        """The problems whose prompts keep to max_prompt_tokens.

        prompts.overlong=error: longer ones raise UserError; skip: they are left out, with a line
        on stderr.
        """
        kept = []
        for label, builder in self._builders.items():
            asked = {_asked(problem): problem for problem in problems if problem.set == label}
            kept += [asked[problem] for problem in builder.filter(list(asked), ("student",))]
        return kept

    def prompt(self, problem: EvalProblem) -> list[int]:
        """Token ids of a problem's prompt."""
        return self._builders[problem.set].student(_asked(problem))


def _asked(problem: EvalProblem) -> Problem:
    return Problem(problem.problem, problem.question, problem.answer, problem.answer)
