"""What a run generates and reads must fit the model's context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.prompts import Measured
from opsd_train.methods import METHODS


@dataclass(frozen=True)
class _Longest:
    """The longest sequence of one kind."""

    what: str
    tokens: int  # of texts that are given
    new_key: str | None = None  # of the limit of what is generated after them
    new: int = 0


def heldout_texts(config: Config) -> tuple[str, ...]:
    """The prompts under which held-out problems are read."""
    kind, evaluation = METHODS[config.method], config.evaluation
    divergence = kind.divergence and kind.teacher_prompt and evaluation.divergence
    return ("student", "teacher") if evaluation.teacher or divergence else ("student",)


def check_context(
    config: Config, readers: Mapping[str, Any], train: Measured, heldout: Measured
) -> None:
    """Raises UserError if a sequence of training or evaluation is longer than a model reads.

    `readers`: the models' configurations by their role, "model" and with distill "teacher".
    `train` has the lengths of the texts that the method requires, `heldout` those of
    `heldout_texts`; it may be empty.
    """
    found = [*_training(config, train), *_evaluation(config, heldout)]
    for reader, model_config in readers.items():
        limit = context_of(model_config)
        worst = max(found, key=lambda longest: longest.tokens + longest.new)
        if limit is not None and worst.tokens + worst.new > limit:
            raise UserError(_excess(worst, reader, limit))


def context_of(model_config: Any) -> int | None:
    """Positions of the model; None where it names none."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def _training(config: Config, train: Measured) -> Iterator[_Longest]:
    kind = METHODS[config.method]
    if kind.source(config) == "solution":
        tokens, problem = train.longest("student", "solution")
        yield _Longest(f"prompt and solution of {problem.id} have", tokens)
        return
    # A teacher reads, or writes, the same completions after its own prompt.
    for side in kind.required_texts(config):
        tokens, problem = train.longest(side)
        new = config.rollout.max_new_tokens
        yield _Longest(f"{side} prompt of {problem.id} has", tokens, "rollout.max_new_tokens", new)


def _evaluation(config: Config, heldout: Measured) -> Iterator[_Longest]:
    for side in heldout_texts(config) if heldout.problems else ():
        tokens, problem = heldout.longest(side)
        new = config.evaluation.max_new_tokens
        what = f"{side} prompt of the held-out {problem.id} has"
        yield _Longest(what, tokens, "evaluation.max_new_tokens", new)


def _excess(found: _Longest, reader: str, limit: int) -> str:
    new = f" and with {found.new_key}={found.new}" if found.new_key else ","
    if found.new_key and found.tokens < limit:
        advice = f"set {found.new_key} to {limit - found.tokens} or less"
    else:
        keys = "prompts.max_prompt_tokens" + ("" if found.new_key else " or max_solution_tokens")
        advice = f"lower {keys}, with prompts.overlong=skip"
    return (
        f"the {found.what} {found.tokens} tokens{new} more than the {reader}'s context of {limit}; "
        f"{advice}"
    )
