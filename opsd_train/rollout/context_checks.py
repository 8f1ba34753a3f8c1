"""Checks before anything is generated: the longest sequences fit the models and the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.prompts import Measured
from opsd_train.methods import METHODS


@dataclass(frozen=True)
class LongestSequence:
    """The longest sequence of one kind: texts that are given, then tokens that are generated."""

    what: str
    """The texts, as the error names them: "student prompt of p-7 has"."""
    tokens: int
    """Of the texts."""
    new_key: str | None = None
    """The configuration key that limits what is generated; None where nothing is."""
    new: int = 0
    """That key's value, in tokens."""

    @property
    def total(self) -> int:
        """Tokens, with as many generated as allowed."""
        return self.tokens + self.new


def heldout_texts(config: Config) -> tuple[str, ...]:
    """The sides ("student", "teacher") under whose prompts held-out problems are read."""
    kind, evaluation = METHODS[config.method], config.evaluation
    divergence = kind.divergence and kind.teacher_prompt(config) and evaluation.divergence
    return ("student", "teacher") if evaluation.teacher or divergence else ("student",)


def check_context(
    config: Config,
    model: Any,
    teachers: Mapping[str | None, Any],
    train: Measured,
    heldout: Measured,
) -> None:
    """Raises UserError if a sequence of training or evaluation is longer than a model reads.

    model     configuration of the trained model
    teachers  those of other models, by the teacher's name
    train     has the lengths of the texts that the method requires
    heldout   those of `heldout_texts`; it may be empty
    """
    evaluation = config.evaluation
    both: tuple[str, ...] = ("student", "teacher")
    trained, asked = both, both
    if config.distill is not None:  # the model is not its own teacher
        trained, asked = ("student",), ("student", *["teacher"] * evaluation.teacher)
    own = [*_training(config, train, trained), *_evaluation(config, heldout, asked)]
    _check_longest(own, model, "model")
    for name, model_config in teachers.items():
        assert config.distill is not None
        sides = (config.distill.by_name()[name].prompt,)
        read = [*_training(config, train.of_teacher(name), sides)]
        if evaluation.divergence:
            read += _evaluation(config, heldout.of_teacher(name), sides)
        _check_longest(read, model_config, "teacher" if name is None else f"teacher {name}")


def check_fits(longest: LongestSequence, model_config: Any, role: str = "model") -> None:
    """Raises UserError if the sequence is longer than the context of the model in this role."""
    limit = context_of(model_config)
    if limit is None or longest.total <= limit:
        return
    key = longest.new_key
    new = f" and with {key}={longest.new}" if key else ","
    if key and longest.tokens < limit:
        advice = f"set {key} to {limit - longest.tokens} or less"
    else:
        keys = "prompts.max_prompt_tokens" + ("" if key else " or max_solution_tokens")
        advice = f"lower {keys}, with prompts.overlong=skip"
    raise UserError(
        f"the {longest.what} {longest.tokens} tokens{new} more than the {role}'s context of "
        f"{limit}; {advice}"
    )


def check_batch_tokens(key: str, batch_tokens: int, prompt: int, new: int) -> None:
    """Raises UserError if a prompt and `new` tokens exceed a batch of the transformers engine.

    `key`: the configuration key that `batch_tokens` is from.
    """
    if prompt + new > batch_tokens:
        raise UserError(
            f"{key}={batch_tokens} is less than one sequence: a prompt of {prompt} tokens and "
            f"{new} new ones; raise it"
        )


def context_of(model_config: Any) -> int | None:
    """The most tokens that the model reads; None where its configuration does not say."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def _check_longest(sequences: Sequence[LongestSequence], model_config: Any, role: str) -> None:
    if sequences:  # a teacher may have no problems
        check_fits(max(sequences, key=lambda sequence: sequence.total), model_config, role)


def _training(config: Config, train: Measured, sides: Sequence[str]) -> Iterator[LongestSequence]:
    kind = METHODS[config.method]
    # A teacher reads, or writes, the same completions after its own prompt.
    read = [side for side in kind.required_texts(config) if side in sides]
    for side in read if train.problems else ():
        if "solution" in kind.sources(config):
            tokens, problem = train.longest(side, "solution")
            yield LongestSequence(f"{side} prompt and solution of {problem.id} have", tokens)
        if kind.source(config) == "solution":
            continue
        tokens, problem = train.longest(side)
        new = config.rollout.max_new_tokens
        what = f"{side} prompt of {problem.id} has"
        yield LongestSequence(what, tokens, "rollout.max_new_tokens", new)


def _evaluation(
    config: Config, heldout: Measured, sides: Sequence[str]
) -> Iterator[LongestSequence]:
    read = [side for side in heldout_texts(config) if side in sides]
    for side in read if heldout.problems else ():
        tokens, problem = heldout.longest(side)
        new = config.evaluation.max_new_tokens
        what = f"{side} prompt of the held-out {problem.id} has"
        yield LongestSequence(what, tokens, "evaluation.max_new_tokens", new)
