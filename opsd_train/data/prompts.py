"""Prompts as token ids: the recipe's templates, wrapped in the tokenizer's chat template."""

from __future__ import annotations

import itertools
import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from opsd_train.config.errors import UserError
from opsd_train.config.schema import PromptsConfig
from opsd_train.data.chat_tokens import THINKING, ControlTokenEscaper, turn_end
from opsd_train.data.problems import Problem

_NAMES = {"student": "student prompt", "teacher": "teacher prompt", "solution": "solution"}
_PROBE = Problem(id="probe", question="1 + 1 =", answer="2", solution="1 + 1 = 2")
_PROBES = {"sibling": "1 + 1 = 2", "feedback": "The answer 3 is wrong. The right answer is 2."}
_BATCH = 1000  # texts per call of the tokenizer


@dataclass(frozen=True)
class Measured:
    """Problems with the lengths of their texts in tokens."""

    problems: list[Problem]
    tokens: dict[str, array[int]]  # by text: "student", "teacher", "solution"; one per problem

    def longest(self, *texts: str) -> tuple[int, Problem]:
        """The largest total length of these texts, in tokens, and the problem that has it."""
        sums = list(map(sum, zip(*(self.tokens[side] for side in texts), strict=True)))
        index = max(range(len(sums)), key=sums.__getitem__)
        return sums[index], self.problems[index]

    def of_teacher(self, name: str | None) -> Measured:
        """Those of the problems that this teacher of distill.teachers reads."""
        kept = [index for index, problem in enumerate(self.problems) if problem.teacher == name]
        tokens = {
            s: array("i", map(lengths.__getitem__, kept)) for s, lengths in self.tokens.items()
        }
        return Measured([self.problems[index] for index in kept], tokens)


@dataclass(frozen=True)
class RolloutContext:
    """What the teacher may see of a rollout, beside the problem: see prompts.teacher_context."""

    attempt: str  # this sample's text
    sibling: str | None = None
    feedback: str | None = None


class PromptBuilder:
    """Builds the prompts of student and teacher, and reference solutions, as token ids.

    `end`: ids of the tokens that end a completion to train on.
    """

    def __init__(self, tokenizer: Any, config: PromptsConfig) -> None:
        """Render every template once, so that mistakes show before the model is loaded.

        Raises UserError for a template that fails, and if a chat template is asked for but missing.
        Warns on stderr if one prompt opens or closes a think block and the other does not.
        """
        self.tokenizer = tokenizer
        self.config = config
        self._escaper = ControlTokenEscaper(tokenizer)
        # A solution may contain thinking, and then it needs the tokens that enclose it.
        self._solution_escaper = ControlTokenEscaper(tokenizer, allowed=THINKING)
        # A rollout's texts are escaped as they are printed: a template may cut them at a token.
        escape = self._escaper.escape_printed if config.teacher_context else None
        environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=escape)
        self._templates = {
            side: _compile(environment, side, getattr(config, side))
            for side in ("student", "teacher")
        }
        self.end = turn_end(tokenizer) if config.student_chat_template else [tokenizer.eos_token_id]
        starts = {side: _thinking(self._probe(side)) for side in self._templates}
        if starts["student"] != starts["teacher"]:
            print(
                f"warning: the student's prompt {starts['student']}, the teacher's "
                f"{starts['teacher']}: completions do not start in the same state",
                file=sys.stderr,
            )

    def student(self, problem: Problem) -> list[int]:
        """Token ids of the student's prompt."""
        return self._encode("student", [problem])[0]

    def teacher(self, problem: Problem) -> list[int]:
        """Token ids of the teacher's prompt, which contains the solution."""
        return self._encode("teacher", [problem])[0]

    def teacher_after(
        self, problem: Problem, context: RolloutContext
    ) -> tuple[list[int], list[str]]:
        """Token ids of the teacher's prompt with what it sees of a rollout, and what of sibling and
        feedback its template shows."""
        problem = self._escaper.escape(problem)
        texts = {n: text and self._escaper.without_marks(text) for n, text in vars(context).items()}
        text = self._text("teacher", problem, texts)
        ids = self._escaper.encode([text], self._adds_special_tokens("teacher"))[0]
        return ids, [name for name in _PROBES if self._shows(name, problem, texts)]

    def solution(self, problem: Problem) -> list[int]:
        """Token ids of the reference solution as a completion, including `end`."""
        return self._encode("solution", [problem])[0]

    def filter(self, problems: list[Problem], texts: Sequence[str]) -> list[Problem]:
        """The problems whose `texts` are within their limits; see `measure`."""
        return self.measure(problems, texts).problems

    def measure(self, problems: list[Problem], texts: Sequence[str]) -> Measured:
        """The problems whose `texts` ("student", "teacher", "solution") are within their limits.

        With prompts.overlong=skip the others are counted on stderr; otherwise they raise UserError,
        as does a result without any problem.
        """
        kept: list[int] = []
        worst, where = 0.0, ""
        lengths = {side: self._lengths(problems, side) for side in texts}
        for index, problem in enumerate(problems):
            excess, side = max(
                ((lengths[side][index] - self._limit(side), side) for side in texts),
                key=itemgetter(0),
            )
            if excess <= 0:
                kept.append(index)
            elif excess > worst:
                worst = excess
                where = f"{_NAMES[side]} of {problem.id}, {lengths[side][index]} tokens"
        dropped = len(problems) - len(kept)
        if dropped == 0:
            return Measured(problems, lengths)
        limits = " or ".join(dict.fromkeys(self._limit_text(side) for side in texts))
        line = f"{dropped} of {len(problems)} problems are longer than {limits} (worst: {where})"
        if self.config.overlong == "error":
            raise UserError(f"{line}; raise the limit, or skip them: prompts.overlong=skip")
        if not kept:
            raise UserError(f"{line}; none is left")
        print(f"skipped: {line}", file=sys.stderr)
        tokens = {side: array("i", map(lengths[side].__getitem__, kept)) for side in texts}
        return Measured([problems[index] for index in kept], tokens)

    def _lengths(self, problems: Sequence[Problem], side: str) -> array[int]:
        """Length of each problem's text, in tokens; at most, where it depends on a rollout."""
        if side == "teacher" and self.config.teacher_context:
            return array("i", [self.config.max_prompt_tokens]) * len(problems)
        lengths = array("i")
        for first in range(0, len(problems), _BATCH):
            lengths.extend(map(len, self._encode(side, problems[first : first + _BATCH])))
        return lengths

    def _adds_special_tokens(self, side: str) -> bool:
        # A chat template writes its own special tokens; plain text gets the tokenizer's.
        return not getattr(self.config, f"{side}_chat_template")

    def _limit(self, side: str) -> float:
        if side != "solution":
            return self.config.max_prompt_tokens
        return self.config.max_solution_tokens or math.inf

    def _limit_text(self, side: str) -> str:
        key = "max_solution_tokens" if side == "solution" else "max_prompt_tokens"
        return f"prompts.{key}={getattr(self.config, key)}"

    def _encode(self, side: str, problems: Sequence[Problem]) -> list[list[int]]:
        """Token ids of each problem's text, in one call, so that the tokenizer uses all cores."""
        if side == "solution":
            escaper = self._solution_escaper
            texts = [escaper.escape(problem).solution for problem in problems]
            return [[*ids, *self.end] for ids in escaper.encode(texts, add_special_tokens=False)]
        texts = [self._text(side, self._escaper.escape(problem)) for problem in problems]
        return self._escaper.encode(texts, self._adds_special_tokens(side))

    def _probe(self, side: str) -> str:
        """A prompt of a made-up problem; of a teacher's, every combination of what it may see."""
        sees = self.config.teacher_context if side == "teacher" else []
        if not sees:
            return self._text(side, _PROBE)
        choices = itertools.product(*([_PROBES[name], None] for name in sees))
        none = dict.fromkeys(_PROBES) | {"attempt": "3"}
        contexts = [none | dict(zip(sees, chosen, strict=True)) for chosen in choices]
        texts = [self._text(side, _PROBE, context) for context in contexts]
        for name in sees:
            if not any(self._shows(name, _PROBE, context) for context in contexts):
                raise UserError(
                    f"prompts.teacher does not show the {name} of prompts.teacher_context: print "
                    f"{{{{ {name} }}}}, or leave it out of teacher_context"
                )
        return texts[0]

    def _shows(self, name: str, problem: Problem, context: Mapping[str, Any]) -> bool:
        """Whether the teacher's prompt would be another without this text of a rollout."""
        if not context[name]:
            return False
        with_it, without = (
            self._text("teacher", problem, {**context, **changed}) for changed in ({}, {name: None})
        )
        return with_it != without

    def _text(self, side: str, problem: Problem, context: Mapping[str, Any] | None = None) -> str:
        try:
            content = self._templates[side].render(problem=problem, **(context or {}))
        except Exception as error:  # a template may fail in any way
            raise UserError(f"prompts.{side}: {error}") from None
        system = self.config.system
        if not getattr(self.config, f"{side}_chat_template"):
            return content if system is None else f"{system}\n\n{content}"
        return self._chat(side, content, system)

    def _chat(self, side: str, content: str, system: str | None) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"prompts.{side}_chat_template is true, but the tokenizer has no chat template; "
                "set it to false"
            )
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        thinking = getattr(self.config, f"{side}_thinking")
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template: {error.message}") from None


def _compile(environment: jinja2.Environment, side: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"prompts.{side}, line {error.lineno}: {error.message}") from None


def _thinking(prompt: str) -> str:
    """What the end of a prompt does to the think block, worded for the warning."""
    end = prompt.rstrip()
    if end.endswith(THINKING[0]):
        return "opens a think block"
    if end.endswith(THINKING[1]):
        return "closes the think block"
    return "leaves the think block alone"
