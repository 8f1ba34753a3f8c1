"""The answer check: what a completion answers, and whether that is right."""

import re
from fractions import Fraction

from opsd_train.data import Problem

BOXED = r"\boxed{"
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
NUMBER = re.compile(r"[+-]?(?:\d+/\d+|\d+\.?\d*|\.\d+)")
# A sign belongs to the number unless it stands between two: "= -4" ends in -4, "7 - 3" in 3.
LAST_NUMBER = re.compile(r"(?:(?<![\w)])(?<![\w)] )[+-] ?)?(?:\d+/\d+|\d+(?:\.\d+)?|\.\d+)")


def extract_answer(text: str, expected: str) -> str | None:
    """What a completion answers: its last \\boxed{…}; else, where a number is expected, its last
    number; else its last line that is not empty."""
    start = text.rfind(BOXED)
    if start >= 0:
        boxed = _until_closing_brace(text[start + len(BOXED) :])
        if boxed is not None:
            return boxed.strip()
    if _number(normalise(expected)) is not None:
        numbers = LAST_NUMBER.findall(_without_thousands(text))
        return numbers[-1] if numbers else None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def is_correct(problem: Problem, text: str) -> bool:
    """Whether a completion answers the problem: equal as numbers, or as normalised text."""
    answer = extract_answer(text, problem.answer)
    if answer is None:
        return False
    given, expected = normalise(answer), normalise(problem.answer)
    numbers = _number(given), _number(expected)
    return numbers[0] == numbers[1] if None not in numbers else given == expected


def normalise(answer: str) -> str:
    """Removes what does not change an answer: case, spaces, $, quotes, emphasis, a final stop."""
    text = _without_thousands(answer.lower())
    text = re.sub(r"\s+|\$|\\[,;! ]", "", text)
    return text.strip("*`'\"").rstrip(".").strip("*`'\"")


def _without_thousands(text: str) -> str:
    return THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _until_closing_brace(text: str) -> str | None:
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return None


def _number(text: str) -> Fraction | None:
    # Fraction is exact, so 0.1 equals 1/10; the length bound keeps absurd numbers cheap.
    if len(text) > 100 or not NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None
