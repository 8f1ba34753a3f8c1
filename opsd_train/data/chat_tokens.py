"""Control tokens: encode text that spells one as plain text, and find those that end a turn."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from opsd_train.config.errors import UserError
from opsd_train.data.problems import Problem

THINKING = ("<think>", "</think>")
"""Tokens that open and close a think block."""

_MARK = "\ufdd0"  # a noncharacter: Unicode reserves it, so texts do not contain it
_QUESTION, _ANSWER = "What is 1 + 1?", "The answer is 2."


class ControlTokenEscaper:
    """Encodes the texts of problems so that a control token they spell stays plain text.

    `escape` puts a mark inside each such token; `encode` tokenizes and drops the marks.
    """

    def __init__(self, tokenizer: Any, allowed: Sequence[str] = ()) -> None:
        """`allowed`: control tokens that the texts may contain as tokens."""
        self._tokenizer = tokenizer
        names = control_tokens(tokenizer).difference(allowed)
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def escape(self, problem: Problem) -> Problem:
        """The problem with a mark inside each control token that its texts spell."""
        texts = {name: getattr(problem, name) for name in ("question", "answer", "solution")}
        for name, text in texts.items():
            if _MARK in text:
                raise UserError(
                    f"problem {problem.id}: its {name} has U+FDD0, which is no character; remove it"
                )
        if not any(map(self._pattern.search, texts.values())):
            return problem
        return replace(
            problem,
            question=self._insert_marks(problem.question),
            answer=self._insert_marks(problem.answer),
            solution=self._insert_marks(problem.solution),
        )

    def escape_printed(self, value: Any) -> Any:
        """What a template prints, with a mark inside each control token that its text spells."""
        return self._insert_marks(value) if isinstance(value, str) else value

    @staticmethod
    def without_marks(text: str) -> str:
        """A text that a model wrote, which may hold what no text should."""
        return text.replace(_MARK, "\ufffd")

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts that contain escaped problems, without the marks."""
        encoded = self._tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return [
            self._encode_marked(text, add_special_tokens) if _MARK in text else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _insert_marks(self, text: str) -> str:
        while self._pattern.search(text):  # repeated, as one token may contain another
            text = self._pattern.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", text)
        return text

    def _encode_marked(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode the whole text at once, so that only the marks split words; drop their tokens."""
        try:
            encoded = self._tokenizer(
                text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
            )
        except (NotImplementedError, ValueError):
            raise UserError(_cannot(text)) from None
        ids = []
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            span = text[start:end]
            if span == _MARK:
                continue
            if _MARK in span:
                raise UserError(_cannot(text))
            ids.append(token)
        return ids


def control_tokens(tokenizer: Any) -> set[str]:
    """The special tokens, and the other added tokens that occur in the chat template."""
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.values()
    written = {t.content for t in added if t.content in template and not _is_word(t.content)}
    names = {t.content for t in added if t.special} | written | set(tokenizer.all_special_tokens)
    return {name for name in names if len(name) > 1}


def turn_end(tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an assistant's turn; a completion stops at the last of them.

    They are the control tokens that the chat template writes after the turn whether or not another
    turn follows; without a template, or if it writes none, the tokenizer's end token.
    """
    control = set(tokenizer.convert_tokens_to_ids(sorted(control_tokens(tokenizer))))
    turns = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION)]
    last, between = (_after_answer(tokenizer, turns[:count], control) for count in (2, 3))
    pairs = zip(last, between, strict=False)
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return common or last or [tokenizer.eos_token_id]


def warn_if_turn_ends_differ(student: Any, teacher: Any, name: str) -> None:
    """Warn on stderr if two tokenizers end a turn differently; `name`: the teacher model's."""
    ends = [tokenizer.decode(turn_end(tokenizer)) for tokenizer in (student, teacher)]
    if ends[0] != ends[1]:
        print(
            f"warning: distill.teacher={name} ends a turn with {ends[1]!r}, the student with "
            f"{ends[0]!r}: the last token of a completion is unlikely under the teacher",
            file=sys.stderr,
        )


def _after_answer(tokenizer: Any, turns: Sequence[tuple[str, str]], control: set[int]) -> list[int]:
    """The control tokens that directly follow the answer when the template renders `turns`."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may fail in any way
        return []
    _, found, tail = text.rpartition(_ANSWER)
    ids = tokenizer(tail.lstrip() if found else "", add_special_tokens=False)["input_ids"]
    return list(takewhile(control.__contains__, ids))


def _is_word(token: str) -> bool:
    return token.isspace() or token.isalnum()


def _cannot(text: str) -> str:
    """Error message about the first marked token of the text."""
    start = max(text.index(_MARK) - 1, 0)
    found = text[start : start + 20].replace(_MARK, "")
    return (
        f"this tokenizer cannot encode the control token at {found!r} as plain text; remove rows "
        "that contain it"
    )
