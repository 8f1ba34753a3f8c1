"""Control tokens of a tokenizer: text that spells one stays text, and which of them end a turn."""

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
_MARK = "\ufdd0"  # Unicode keeps it out of texts
_QUESTION, _ANSWER = "What is 1 + 1?", "The answer is 2."


class ControlTokens:
    """Reads the texts of problems as text, also where they spell a control token."""

    def __init__(self, tokenizer: Any, but: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        names = control_tokens(tokenizer).difference(but)
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def marked(self, problem: Problem) -> Problem:
        """The problem with a mark inside of each control token that it spells."""
        texts = {name: getattr(problem, name) for name in ("question", "answer", "solution")}
        for name, text in texts.items():
            if _MARK in text:
                raise UserError(f"problem {problem.id}: its {name} has U+FDD0, no character at all")
        if not any(map(self._pattern.search, texts.values())):
            return problem
        return replace(problem, **{name: self._with_marks(text) for name, text in texts.items()})

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts made of marked problems: of the texts without the marks."""
        encoded = self._tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return [
            self._without_marks(text, add_special_tokens) if _MARK in text else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _with_marks(self, text: str) -> str:
        while self._pattern.search(text):  # again, where a token holds another
            text = self._pattern.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", text)
        return text

    def _without_marks(self, text: str, add_special_tokens: bool) -> list[int]:
        """One pass over the whole text, so that nothing but the marks divides its words."""
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
    """The special tokens, and what other added tokens the chat template writes."""
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.values()
    written = {t.content for t in added if t.content in template and not _is_word(t.content)}
    names = {t.content for t in added if t.special} | written | set(tokenizer.all_special_tokens)
    return {name for name in names if len(name) > 1}


def turn_end(tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an assistant's turn; a completion stops at the last of them.

    The control tokens that the chat template writes after the turn, whether or not another turn
    follows; the tokenizer's end token where it has no template or the template writes none.
    """
    control = set(tokenizer.convert_tokens_to_ids(sorted(control_tokens(tokenizer))))
    turns = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION)]
    last, between = (_after_answer(tokenizer, turns[:count], control) for count in (2, 3))
    pairs = zip(last, between, strict=False)
    both = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return both or last or [tokenizer.eos_token_id]


def warn_of_other_turn_end(student: Any, teacher: Any, name: str) -> None:
    """Says on stderr if the tokenizers end a turn differently; `name` is the teacher's."""
    ends = [tokenizer.decode(turn_end(tokenizer)) for tokenizer in (student, teacher)]
    if ends[0] != ends[1]:
        print(
            f"warning: distill.teacher={name} ends a turn with {ends[1]!r}, the student with "
            f"{ends[0]!r}: it hardly expects the last token of a completion",
            file=sys.stderr,
        )


def _after_answer(tokenizer: Any, turns: Sequence[tuple[str, str]], control: set[int]) -> list[int]:
    if not tokenizer.chat_template:
        return []
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may refuse a conversation in any way its author likes
        return []
    _, found, tail = text.rpartition(_ANSWER)
    ids = tokenizer(tail.lstrip() if found else "", add_special_tokens=False)["input_ids"]
    return list(takewhile(control.__contains__, ids))


def _is_word(token: str) -> bool:
    return token.isspace() or token.isalnum()


def _cannot(text: str) -> str:
    start = max(text.index(_MARK) - 1, 0)
    found = text[start : start + 20].replace(_MARK, "")
    return (
        f"this tokenizer cannot read the control token at {found!r} as text; leave rows that spell "
        "it out of the data"
    )
