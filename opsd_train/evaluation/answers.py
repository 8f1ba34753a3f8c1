"""Where a completion's answer is, and whether it is right: what one grading process runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

from opsd_train.rewards import extract_answer

# What is looked at by math-verify; its parser takes seconds for more, and no answer needs it.
LONGEST = 10_000
BOXED_ONLY = (LatexExtractionConfig(boxed_match_priority=0),)
# Escaped braces are no braces; some models write \\boxed as if it were inside a Python string.
TOKENS = re.compile(r"(?P<box>\\{1,2}boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
MIXED = re.compile(r"(-?\d+)\s+(\d+)/(\d+)")
DIGIT_SPACE = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\{,\})(?=\d{3}(?!\d))")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")

# The time limit comes from outside, so math-verify's warnings about it are beside the point.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def answer_part(text: str) -> str:
    """What follows the last </think>; all of a text without it, or with nothing after it."""
    after = text.rpartition("</think>")[2]
    return after if after.strip() else text


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close (the inner one of two nested)."""
    opened: list[int | None] = []  # where the content starts, for a box
    best: tuple[int, int] | None = None
    for token in TOKENS.finditer(text):
        if token["box"] or token["open"]:
            opened.append(token.end() if token["box"] else None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = start, token.start()
    return None if best is None else text[best[0] : best[1]].strip()


def check(text: str, expected: str) -> tuple[bool, str | None, bool]:
    """(right, the answer, whether it was in a closed box) by math-verify."""
    part = answer_part(text)
    box = last_box(part)
    if box is not None:
        return bool(box) and equal(box, expected), box or None, True
    found = parse(part[-LONGEST:], parsing_timeout=None)
    if not found:
        return False, None, False
    right = verify(_parsed(expected), found, allow_set_relation_comp=True, timeout_seconds=None)
    return right, str(found[-1]), False


def check_by_task(
    text: str, expected: str, task: str, entry: dict[str, Any] | None
) -> tuple[bool, str | None, bool]:
    """(right, the answer, whether there is one) by the reasoning_gym task's own scorer."""
    answer = extract_answer(answer_part(text), expected)
    if answer is None:
        return False, None, False
    return _scorer(task)(answer, entry) == 1.0, answer, True


@lru_cache(maxsize=10_000)  # samples of one problem often agree
def equal(given: str, expected: str) -> bool:
    """Whether a boxed answer is the expected one: the same text, or equal to math-verify."""
    given, expected = _clean(given), _clean(expected)
    if given == expected:
        return True
    words = _words(expected)
    if words is not None:
        return _words(given) == words
    if max(len(given), len(expected)) > LONGEST:
        return False
    return verify(
        _parsed(expected), _parsed(given), allow_set_relation_comp=True, timeout_seconds=None
    )


def _words(answer: str) -> str | None:
    r"""The words of \text{east} or Tuesday; None for what may be mathematics, such as x or ab.

    math-verify reads bare letters as a product, to which listen and silent are equal.
    """
    inside = TEXT.fullmatch(answer)
    text = (inside[1] if inside else answer).strip().removesuffix(".").casefold()
    least = 2 if inside else 4  # letters of the longest word
    is_words = WORDS.fullmatch(text) and max(map(len, re.split(r"[ '-]", text))) >= least
    return text if is_words else None


@lru_cache(maxsize=1000)
def _parsed(answer: str) -> list[Any]:
    return parse(rf"\boxed{{{_clean(answer)}}}", BOXED_ONLY, parsing_timeout=None)


def _clean(answer: str) -> str:
    """Without what math-verify stumbles over: a final stop, 1\\,000 and the mixed number 1 1/2."""
    text = DIGIT_SPACE.sub("", " ".join(answer.split()).strip("$").strip().removesuffix("."))
    mixed = MIXED.fullmatch(text)
    return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}" if mixed else text


@lru_cache(maxsize=100)
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)
