"""Where an OPSD run's divergence is in its completions: by position, by kind of token, by token.

A *style token* is about wording or layout, not about the problem. There are three kinds of tokens:

- "end": a special token, such as <|im_end|>;
- "task": it has a digit, a mathematical sign, or part of a task word: a single letter, which may be
  a variable, or a whole word of the question or the answer, in any case;
- "style": all others: the model's own words, spaces, line ends, punctuation.

A question with "the" or "find" makes these task words, so the share of style is a lower bound.
Words are found in the joined text, so a token that is half a word has the kind of the word.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opsd_train.reporting.metrics_log import read_rows
from opsd_train.reporting.plots import position_means
from opsd_train.reporting.sample_table import Pieces, Rows

KINDS = ("task", "style", "end")
MAX_TOKENS = 12
MIN_COUNT = 3  # occurrences of a token in the list of the largest

_WORD = re.compile(r"[^\W\d_]+")
_SIGN = re.compile(r"[\d+\-*/=<>^%|~×÷·−±≤≥≠≈√∑∏∫∞∈∧∨¬→\\$(){}\[\]]")  # noqa: RUF001
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")


def diagnose(run_folder: Path) -> dict[str, Any] | None:
    """Diagnostics from metrics.jsonl and samples.jsonl, as JSON; None without a divergence.

    "position": the divergence by position over the first and the last quarter of the steps;
    "kinds": the share of each kind in the tokens and in the summed divergence, over all steps, the
    first and the last quarter; "tokens": the tokens with the largest mean divergence, as
    [text, mean, count, kind].
    """
    rows = [row for row in read_rows(run_folder / "metrics.jsonl") if _has_positions(row)]
    samples = [row for row in read_rows(run_folder / "samples.jsonl") if "divergence" in row]
    samples = [row for row in samples if row.get("tokens")]
    if not rows or not samples:
        return None
    steps = sorted({row["step"] for row in samples})
    first, last = set(_quarter(steps)), set(_quarter(steps, last=True))
    return {
        "position": {
            "start": _positions(_quarter(rows)),
            "end": _positions(_quarter(rows, last=True)),
        },
        "kinds": {
            "all": _shares(samples),
            "start": _shares([row for row in samples if row["step"] in first]),
            "end": _shares([row for row in samples if row["step"] in last]),
        },
        "tokens": _largest(samples),
        "completions": len(samples),
    }


def kinds(pieces: Pieces, question: str, answer: str) -> list[str]:
    """The kind of each piece of a completion."""
    known = {word.casefold() for word in _WORD.findall(f"{question} {answer}")}
    text = "".join(piece for piece, _ in pieces)
    task_letters = set()
    for match in _WORD.finditer(text):
        word = match.group()
        if len(word) == 1 or word.casefold() in known:
            task_letters.update(range(match.start(), match.end()))
    found, start = [], 0
    for piece, _ in pieces:
        end = start + len(piece)
        if _SPECIAL.fullmatch(piece):
            found.append("end")
        else:
            task = _SIGN.search(piece) or not task_letters.isdisjoint(range(start, end))
            found.append("task" if task else "style")
        start = end
    return found


def _has_positions(row: dict[str, Any]) -> bool:
    return bool(row.get("divergence_by_position"))


def _quarter(items: list[Any], *, last: bool = False) -> list[Any]:
    size = max(1, len(items) // 4)
    return items[-size:] if last else items[:size]


def _positions(rows: Rows) -> dict[str, Any]:
    positions, means = position_means(rows, "divergence_by_position")
    return {
        "steps": [rows[0]["step"], rows[-1]["step"]],
        "positions": positions,
        "means": [round(mean, 6) for mean in means],
    }


def _tokens(samples: Rows) -> Iterator[tuple[str, float, str]]:
    """(text, divergence, kind) of every token whose divergence is a number."""
    for row in samples:
        pieces = row["tokens"]
        for (text, value), kind in zip(
            pieces, kinds(pieces, row["question"], row["answer"]), strict=True
        ):
            if value is not None:
                yield text, value, kind


def _shares(samples: Rows) -> dict[str, Any]:
    counts, sums = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0.0)
    for _, value, kind in _tokens(samples):
        counts[kind] += 1
        sums[kind] += value
    count, total = sum(counts.values()), sum(sums.values())
    return {
        "count": count,
        "of_tokens": {kind: counts[kind] / count for kind in KINDS} if count else None,
        "of_divergence": {kind: sums[kind] / total for kind in KINDS} if total > 0 else None,
    }


def _largest(samples: Rows) -> list[list[Any]]:
    values, found = defaultdict(list), {}
    for text, value, kind in _tokens(samples):
        values[text].append(value)
        found[text] = kind if found.get(text, kind) == kind else "task or style"
    frequent = [text for text in values if len(values[text]) >= MIN_COUNT] or list(values)
    means = {text: sum(values[text]) / len(values[text]) for text in frequent}
    ranked = sorted(frequent, key=lambda text: means[text], reverse=True)[:MAX_TOKENS]
    return [[text, round(means[text], 5), len(values[text]), found[text]] for text in ranked]
