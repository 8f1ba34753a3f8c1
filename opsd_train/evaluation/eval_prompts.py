"""The prompts of an evaluation: its own template's, or those of the run a set comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import PromptBuilder
from opsd_train.evaluation.sets import EvalProblem, is_heldout, recipe_of, set_label
from opsd_train.evaluation.settings import EvalConfig


class EvalPrompts:
    """Prompts as token ids, for the problems of the named sets."""

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
        """The problems whose prompts keep to max_prompt_tokens; see prompts.overlong."""
        kept = []
        for label, builder in self._builders.items():
            asked = {_asked(problem): problem for problem in problems if problem.set == label}
            kept += [asked[problem] for problem in builder.filter(list(asked), ("student",))]
        return kept

    def prompt(self, problem: EvalProblem) -> list[int]:
        """Token ids of a problem's prompt."""
        return self._builders[problem.set].student(_asked(problem))


def check_context(config: EvalConfig, model_config: Any, longest: int) -> None:
    """Raises UserError unless the longest prompt and its completion fit everywhere."""
    sampling = config.sampling
    needed = longest + sampling.max_new_tokens
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    what = (
        f"the longest prompt has {longest} tokens, with sampling.max_new_tokens="
        f"{sampling.max_new_tokens}"
    )
    if limit is not None and needed > limit:
        raise UserError(
            f"{what} more than the model's context of {limit}; set sampling.max_new_tokens to "
            f"{limit - longest} or less"
            if longest < limit
            else f"{what} more than the model's context of {limit}; lower "
            "prompts.max_prompt_tokens, with prompts.overlong=skip"
        )
    if sampling.engine == "transformers" and needed > sampling.batch_tokens:
        raise UserError(f"{what} more than sampling.batch_tokens={sampling.batch_tokens}; raise it")


def _asked(problem: EvalProblem) -> Problem:
    return Problem(problem.problem, problem.question, problem.answer, problem.answer)
