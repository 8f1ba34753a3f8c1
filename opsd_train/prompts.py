"""Prompts as token ids: templates from the recipe, wrapped in the tokenizer's chat template."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from opsd_train.data import Problem
from opsd_train.errors import UserError
from opsd_train.sections import PromptsConfig

_NAMES = {"student": "student prompt", "teacher": "teacher prompt", "solution": "solution"}
PROBE = Problem(id="probe", question="1 + 1 =", answer="2", solution="1 + 1 = 2")


class PromptBuilder:
    """Builds the prompt of each side for a problem.

    All templates are tried at once, so a mistake in one of them shows before the model loads.
    """

    def __init__(self, tokenizer: Any, config: PromptsConfig):
        self.tokenizer = tokenizer
        self.config = config
        self._known_lengths: dict[tuple[str, Problem], int] = {}
        environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined)
        self._templates = {
            side: _compile(environment, side, getattr(config, side))
            for side in ("student", "teacher")
        }
        starts = {side: _thinking(self._text(side, PROBE)) for side in self._templates}
        if starts["student"] != starts["teacher"]:
            print(
                f"warning: the student's prompt {starts['student']}, the teacher's "
                f"{starts['teacher']}: their first completion token does not mean the same",
                file=sys.stderr,
            )

    def student(self, problem: Problem) -> list[int]:
        """Token ids of the student's prompt."""
        return self._encode("student", problem)

    def teacher(self, problem: Problem) -> list[int]:
        """Token ids of the teacher's prompt, which holds the privileged solution."""
        return self._encode("teacher", problem)

    def solution(self, problem: Problem) -> list[int]:
        """The reference solution as a completion: its token ids and the end token."""
        ids = self.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def filter(self, problems: list[Problem], sides: Sequence[str]) -> list[Problem]:
        """The problems whose `sides` ("student", "teacher", "solution") keep to their limits; see
        `overlong` for the rest."""
        kept, worst, where = [], 0, ""
        lengths = {side: self._lengths(problems, side) for side in sides}
        for index, problem in enumerate(problems):
            excess = {side: lengths[side][index] - self._limit(side) for side in sides}
            side = max(excess, key=excess.get)
            if excess[side] <= 0:
                kept.append(problem)
            elif excess[side] > worst:
                worst = excess[side]
                where = f"{_NAMES[side]} of {problem.id}, {lengths[side][index]} tokens"
        dropped = len(problems) - len(kept)
        if dropped == 0:
            return kept
        limits = " or ".join(dict.fromkeys(self._limit_text(side) for side in sides))
        line = (
            f"{dropped} of {len(problems)} problems are longer than {limits} (the worst: {where})"
        )
        if self.config.overlong == "error":
            raise UserError(f"{line}; raise the limit, or leave them out: prompts.overlong=skip")
        if not kept:
            raise UserError(f"{line}; none is left")
        print(f"skipped: {line}", file=sys.stderr)
        return kept

    def longest(self, problems: Sequence[Problem], sides: Sequence[str]) -> tuple[int, str]:
        """Tokens of the longest of these texts, and whose it is."""
        return max(
            (length, f"{_NAMES[side]} of {problem.id}")
            for side in sides
            for problem, length in zip(problems, self._lengths(problems, side), strict=True)
        )

    def _lengths(self, problems: Sequence[Problem], side: str) -> list[int]:
        """Tokens of each problem's text; all at once, so that the tokenizer uses all cores."""
        known = self._known_lengths
        new = [p for p in dict.fromkeys(problems) if (side, p) not in known]
        if new:
            solution = side == "solution"
            texts = [p.solution if solution else self._text(side, p) for p in new]
            special = not solution and self._special(side)
            encoded = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
            # A solution as a completion has the end token too.
            known |= {(side, p): len(ids) + solution for p, ids in zip(new, encoded, strict=True)}
        return [known[side, problem] for problem in problems]

    def _special(self, side: str) -> bool:
        # A chat template writes its own special tokens; plain text gets the tokenizer's.
        return not getattr(self.config, f"{side}_chat_template")

    def _limit(self, side: str) -> float:
        if side != "solution":
            return self.config.max_prompt_tokens
        return self.config.max_solution_tokens or math.inf

    def _limit_text(self, side: str) -> str:
        key = "max_solution_tokens" if side == "solution" else "max_prompt_tokens"
        return f"prompts.{key}={getattr(self.config, key)}"

    def _encode(self, side: str, problem: Problem) -> list[int]:
        text = self._text(side, problem)
        return self.tokenizer(text, add_special_tokens=self._special(side))["input_ids"]

    def _text(self, side: str, problem: Problem) -> str:
        try:
            content = self._templates[side].render(problem=problem)
        except Exception as error:  # a template can go wrong in any way its author likes
            raise UserError(f"prompts.{side}: {error}") from None
        system = self.config.system
        if not getattr(self.config, f"{side}_chat_template"):
            return content if system is None else f"{system}\n\n{content}"
        return self._chat(side, content, system)

    def _chat(self, side: str, content: str, system: str | None) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"prompts.{side}_chat_template is true, but the tokenizer has no chat template"
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
    """How a prompt leaves the think block, worded for the warning."""
    end = prompt.rstrip()
    if end.endswith("<think>"):
        return "opens a think block"
    if end.endswith("</think>"):
        return "closes the think block"
    return "leaves the think block alone"
