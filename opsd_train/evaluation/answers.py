"""Whether a completion is right: the one check, which runs in a process of its own."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

from opsd_train.evaluation.finding import (
    LONGEST,
    answer_part,
    final_number,
    last_box,
    last_lines,
    normalise,
    only_number,
    plain_number,
    same_lines,
    unadorned,
)

Verdict = tuple[bool, str | None, bool]
"""Right or not; the answer as it was found; whether it has the form asked for."""

NONSENSE = "?"
BOXED_ONLY = (LatexExtractionConfig(boxed_match_priority=0),)
LATEX_ONLY = (LatexExtractionConfig(),)
LATEX_OR_PLAIN = (LatexExtractionConfig(), ExprExtractionConfig())
MIXED = re.compile(r"(-?\d+)\s+(\d+)/(\d+)")
DIGIT_SPACE = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\{,\})(?=\d{3}(?!\d))")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
# To math-verify 2 3 is a product or a sum, 3:45 a ratio, and 0x1F 0 times x.
VERBATIM = re.compile(
    r"[-+]?\d[\d.]*(?:\s+[-+]?\d[\d.]*)+|\d+(?::\d\d)+|[^\W\d_](?:\s+[^\W\d_])+|0[xb][\da-fA-F]+"
)

# The time limit comes from outside, so math-verify's warnings about it are beside the point.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def check(text: str, expected: str) -> Verdict:
    """By math-verify. An answer without a box is also right as the last lines, word for word."""
    part = answer_part(text)
    box = last_box(part)
    if box is not None:
        return bool(box) and equal(box, expected), box or None, True
    lines = last_lines(part, expected)
    if lines is None:
        return False, None, False
    if normalise(lines) == normalise(expected):
        return True, unadorned(lines, expected), False
    if _only_verbatim(expected):
        return False, lines, False
    is_number = plain_number(expected) is not None
    if is_number:
        number = final_number(part)
        if number is not None:
            written = number.text + r"\%" * number.percent
            return equal(written, expected), number.text, False
    # Of plain 2x + 1 or 3:45 math-verify would take the 2 or the 3 for a number.
    places = LATEX_ONLY if is_number else LATEX_OR_PLAIN
    found = parse(_plain_minus(part[-LONGEST:]), places, parsing_timeout=None)
    if not found:
        return False, None, False
    right = verify(_parsed(expected), found, allow_set_relation_comp=True, timeout_seconds=None)
    return right, str(found[-1]), False


def check_by_task(
    text: str,
    expected: str,
    task: str,
    entry: dict[str, Any] | None,
    task_config: dict[str, Any] | None = None,
) -> Verdict:
    """By the reasoning_gym task's own scorer, with the settings that the entry was made with.

    Right is the score 1: what is well formed but wrong scores up to 0.99. An answer that is the
    expected number written otherwise (3.0, 1,234, a typographic minus), or its lines with other
    white space at their ends, reaches the scorer as the task writes it.
    """
    answer = _task_answer(answer_part(text), expected)
    if answer is None:
        return False, None, False
    scorer = _scorer(task, json.dumps(task_config or {}, sort_keys=True))
    right = _scores_one(scorer, answer, entry)
    if right and answer != expected and _scores_one(scorer, NONSENSE, entry):
        right = equal(answer, expected)  # game_of_life_halting takes any text at all
    return right, answer, True


@lru_cache(maxsize=10_000)  # samples of one problem often agree
def equal(given: str, expected: str) -> bool:
    """Whether an answer is the expected one: the same text or number, or equal to math-verify."""
    if normalise(given) == normalise(expected):
        return True
    if _only_verbatim(expected):
        return False
    number = plain_number(expected)
    if number is not None and number == plain_number(given):
        return True
    given, expected = _clean(given), _clean(expected)
    words = _words(expected)
    if words is not None:
        return _words(given) == words
    if max(len(given), len(expected)) > LONGEST:
        return False
    return verify(
        _parsed(expected), _parsed(given), allow_set_relation_comp=True, timeout_seconds=None
    )


def _task_answer(part: str, expected: str) -> str | None:
    """The one text that the scorer is asked about."""
    number, box = plain_number(expected), last_box(part)
    if number is not None:
        found = final_number(part) if box is None else only_number(box)
        if found is not None:
            return _as_expected(found.text, expected)
        if box is None:
            return None
    answer = box if box is not None else last_lines(part, expected)
    if not answer or same_lines(answer, expected):
        return expected if answer else None
    answer = unadorned(answer, expected)
    return answer if number is None else _as_expected(answer, expected)


def _scores_one(
    scorer: Callable[[str, dict[str, Any]], float], answer: str, entry: dict[str, Any] | None
) -> bool:
    try:
        return scorer(answer, entry) == 1.0
    except ValueError:  # prime_factorization reads numbers without asking whether they are some
        return False


def _as_expected(given: str, expected: str) -> str:
    """The task's own spelling of a number; a fraction stays: some tasks want it in lowest terms."""
    same = "/" not in expected and plain_number(given) == plain_number(expected)
    return expected if same else given


def _only_verbatim(expected: str) -> bool:
    """Whether an answer is several numbers, letters or lines, which are no mathematics."""
    if MIXED.fullmatch(expected.strip()):
        return False
    lines = expected.strip().splitlines()
    return bool(VERBATIM.fullmatch(expected.strip())) or (len(lines) > 1 and "\\" not in expected)


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


def _plain_minus(text: str) -> str:
    """Outside of LaTeX, math-verify knows the hyphen alone as a minus."""
    return text.replace("\u2212", "-")


@lru_cache(maxsize=100)
def _scorer(task: str, settings: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(settings)).score_answer
