r"""Finds the answer in a completion, from its text and the form of the expected answer.

Exactly one part of a completion is graded, so listing several answers gains nothing:

1. what follows the last </think>, where there is one;
2. in it the last \boxed{...} whose braces close;
3. without a box: the final number where a number is expected, else as many of the last lines as
   the expected answer has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 10_000  # characters searched where there is no box; no answer needs more

# Escaped braces are no braces; some models write \\boxed as if it were inside a Python string.
_BRACES = re.compile(r"(?P<box>\\{1,2}boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_LABEL = re.compile(
    r"(?i)[*_#> ]*(?:so|thus|hence|therefore)?,? ?(?:the|my)? ?(?:final|correct)? ?answer[*_]*"
    r"(?: is\b|(?= *[:=]))[*_ ]*[:=]?[*_ ]*"
)
_STATED = re.compile(r"(?i)\banswer\b[^\n]{0,60}?(?:\bis\b|:|=)")
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)|\n")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NUMBER = re.compile(
    r"(?:\d+ +)?\d+/\d+"  # 1 1/2
    r"|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
)
_SIGN = re.compile(r"(?P<before>(?:\S ?)?)(?P<sign>[-+]) ?$")
# A number after or before these is an operand, an index, a time of day ... and not an answer.
_WITHIN = re.compile(r"(?:[\w.\\{^_/*√:]|\d, ?|[+*/^√] +|\d +)$")
_GOES_ON = re.compile(
    r" *[-+*/^] *(?:[\d(\\√.]|(?!a\b|I\b)[A-Za-z](?![A-Za-z]))"  # 3 + x
    r"|[\^_{}!(²³½¼¾⅓⅔√\\]|[:,.]\d|[A-Za-z]*[\d^(]|[xyzn](?![A-Za-z])| +\d"
)
_DIGIT_GAP = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\{,\}|['\u2019\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_TIDIER: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"(?<=\d)!(?=\s|$)"), "."),  # "It is 5!"; a factorial is followed by $ or more
    (_DIGIT_GAP, ""),
    (re.compile("[\u2212\u2013\ufe63\uff0d]"), "-"),
    (re.compile("[\u00a0\u2007\u2009\u202f]"), " "),
    (re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)(?![a-z])"), "°"),
    (re.compile(r"\\(?=[%$])|\\left(?![a-z])|\\right(?![a-z])|\\[()\[\]!]"), ""),
    (re.compile(r"\\[,;: ]|~|\\quad"), " "),
    (re.compile('[$\u20ac\u00a3`"\u201c\u201d]'), ""),
    # Asterisks of emphasis and lists; one with a space on both sides, or none, is a product.
    (re.compile(r"(?m)^ *\*+ |(?<![\w)*])\*+(?=[^\s*])|(?<=[^\s*])\*+(?![\w(*])"), ""),
    (re.compile(r"(?<![\w}])_+(?=[-+\d])|(?<=\d)_+(?![\w{])"), ""),
    (re.compile(r"\\times|\\cdot|[\u00d7\u00b7]"), "*"),
    (re.compile("\u00f7"), "/"),
    (re.compile(r"(?<=\d)\s*[x*]\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))"), r"e\1\2"),
    (_THOUSANDS, lambda match: match[0].replace(",", "")),
]


@dataclass(frozen=True)
class Number:
    """A number that is no part of an expression."""

    text: str
    """As it was written."""
    value: Fraction
    """Its exact value; of 50 % that is 50."""
    percent: bool = False
    """Whether a percent sign follows it."""


def answer_part(text: str) -> str:
    """What follows the last </think>; all of a text without it."""
    return text.rpartition("</think>")[2]


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close (the inner one of two nested)."""
    opened: list[int | None] = []  # where the content starts, for a box
    best: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token["box"] or token["open"]:
            opened.append(token.end() if token["box"] else None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = start, token.start()
    return None if best is None else text[best[0] : best[1]].strip()


def last_lines(part: str, expected: str) -> str | None:
    """As many of the last lines as the expected answer has; None where there is no text.

    Lines that fence code are no text. A single line loses what only introduces it ("Answer:").
    """
    lines = [line.rstrip() for line in part[-LONGEST:].splitlines()]
    lines = [line for line in lines if not line.lstrip().startswith("```")]
    while lines and not lines[-1]:
        lines.pop()
    count = len(expected.strip("\r\n").splitlines())
    found = "\n".join(lines[-max(count, 1) :]).strip("\n")
    if not found.strip():
        return None
    if count > 1 or same_lines(found, expected):
        return found
    return found[label.end() :] if (label := _LABEL.match(found)) else found


def final_number(part: str) -> Number | None:
    """The last number of a text, or of the last sentence that says "the answer is".

    None where there is none, or where it is part of an expression: 2/3 is a number, but 3^2, 7 - 3,
    0 0 3 and 3:45 are not.
    """
    text = _tidy(part[-LONGEST:])
    *_, stated = [None, *_STATED.finditer(text)]
    if stated:
        end = _SENTENCE_END.search(text, stated.end())
        text_stated = text[: end.start() if end else len(text)]
        if re.search(r"\d", text_stated[stated.end() :]):
            text = text_stated
    *_, last = [None, *_NUMBER.finditer(text)]
    return None if last is None else _by_itself(text, last)


def only_number(text: str) -> Number | None:
    r"""The only number of a text such as x = 5 or 5\text{ cm}; None if it has more, or if the
    number is part of an expression."""
    text = _tidy(text[-LONGEST:])
    found = list(_NUMBER.finditer(text))
    return _by_itself(text, found[0]) if len(found) == 1 else None


def plain_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number: 1,234, -3, 2/3, \frac{2}{3}, 1 1/2, 1e3.

    None for anything else: 2 + 3, \sqrt{4}, 5 %, 007, and for more than 100 characters.
    """
    if len(text) > 100:
        return None
    tidy = _tidy(text).strip().removesuffix(".").strip("{}")
    found = re.fullmatch(rf"(?P<sign>[-+]?) *(?P<body>{_NUMBER.pattern})", tidy)
    if found is None or re.match(r"0\d", found["body"]):
        return None
    return _value(found["sign"], found["body"])


def unadorned(answer: str, expected: str) -> str:
    r"""The answer without \text{...}, emphasis, quotes and a final stop, unless the expected answer
    has them."""
    inside = re.fullmatch(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", answer.strip())
    text = (inside[1] if inside else answer).strip(" \t*")
    if same_lines(text, expected):
        return expected
    text = text.strip("$*`'\"")
    return text if expected.endswith(".") else text.removesuffix(".").strip("*`'\"")


def same_lines(one: str, two: str) -> bool:
    """Whether two texts differ at most in blank lines around them and white space at line ends."""
    ones, twos = ([line.rstrip() for line in t.strip("\r\n").splitlines()] for t in (one, two))
    return ones == twos or one.strip() == two.strip()


def normalise(answer: str) -> str:
    """The answer in lower case, without $, quotes, emphasis, a final stop and thousands commas.

    Spaces are kept only between two words or numbers of a line.
    """
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer.lower())
    lines = [re.sub(r"\$|\\[,;! ]", "", line) for line in text.strip().splitlines()]
    lines = [re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"\s+", " ", line)) for line in lines]
    return "\n".join(lines).strip("*`'\"").rstrip(".").strip("*`'\"")


def _tidy(text: str) -> str:
    """The text with ASCII signs and spaces, and without the LaTeX that numbers are written with."""
    for pattern, plain in _TIDIER:
        text = pattern.sub(plain, text)
    return text


def _by_itself(text: str, found: re.Match[str]) -> Number | None:
    """The number with its sign, unless it is part of something larger."""
    before, sign = text[max(0, found.start() - 20) : found.start()], ""
    if signed := _SIGN.search(before):
        left, tight = signed["before"], signed.end() == signed.end("sign")
        word = re.search(r"(?:[^\W\d_]{2,}|'s) ?$", before[: signed.start("sign")])
        if re.search(r"[\w)}\]]$", left) or (re.search(r"[\w)}\]] $", left) and not word):
            return None  # 7-3, level-3, x - 3
        if not word or tight:  # not the dash of "in all - 3"
            sign = signed["sign"]
    elif _WITHIN.search(before):
        return None
    after = text[found.end() : found.end() + 20]
    if _GOES_ON.match(after):
        return None
    value = _value(sign, found[0])
    minus = "-" if sign == "-" else ""
    percent = bool(re.match(r" ?%", after))
    return None if value is None else Number(minus + found[0], value, percent)


def _value(sign: str, body: str) -> Fraction | None:
    # Fraction is exact, so 0.1 equals 1/10; the bounds keep absurd numbers cheap.
    exponent = re.search(r"[eE][+-]?(\d+)$", body)
    if len(body) > 100 or (exponent and len(exponent[1]) > 3):
        return None
    whole, _, rest = body.rpartition(" ")
    try:
        value = Fraction(rest) + (int(whole) if whole.strip() else 0)
    except ZeroDivisionError:
        return None
    return -value if sign == "-" else value
