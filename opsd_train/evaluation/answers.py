"""Checks one completion against the expected answer. Worker processes import this, no others."""

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
"""Right or not; the answer found in the text; whether it has the form asked for (see Grade)."""
Scorer = Callable[[str, dict[str, Any] | None], float]  # of an answer to a task's entry

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

# Workers are stopped from outside; math-verify would warn that its own time limit is off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def check(text: str, expected: str) -> Verdict:
    """Check by math-verify. An answer without a box is right, too, if the last lines are the
    expected answer word for word."""
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
    """Check by the reasoning_gym task's own scorer.

    `entry` is the task's ("question", "answer", "metadata"), `task_config` the settings it was
    made with. Only a score of 1 is right: a well-formed wrong answer scores up to 0.99. An answer
    that differs from the expected one only in how a number is written (3.0, 1,234, a typographic
    minus) or in white space at line ends is passed to the scorer as the task writes it.
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


def _scores_one(scorer: Scorer, answer: str, entry: dict[str, Any] | None) -> bool:
    try:
        return scorer(answer, entry) == 1.0
    except ValueError:  # prime_factorization reads numbers without asking whether they are some
        return False


def _as_expected(given: str, expected: str) -> str:
    """A number as the task writes it. A fraction is kept: some tasks want it in lowest terms."""
    same = "/" not in expected and plain_number(given) == plain_number(expected)
    return expected if same else given


def _only_verbatim(expected: str) -> bool:
    """Whether an answer is a row of numbers or letters, or several lines: compared as text."""
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
    """Rewrites what math-verify misreads: a final stop, 1\\,000 and the mixed number 1 1/2."""
    text = DIGIT_SPACE.sub("", " ".join(answer.split()).strip("$").strip().removesuffix("."))
    mixed = MIXED.fullmatch(text)
    return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}" if mixed else text


def _plain_minus(text: str) -> str:
    """The minus sign as a hyphen, the only minus that math-verify reads outside LaTeX."""
    return text.replace("\u2212", "-")


@lru_cache(maxsize=100)
def _scorer(task: str, settings: str) -> Scorer:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(settings)).score_answer
