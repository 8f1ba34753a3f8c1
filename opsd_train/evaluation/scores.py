"""Scores over problems: avg@k, pass@k, majority@k, format, finished and length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np

from opsd_train.config.errors import UserError
from opsd_train.evaluation.finding import normalise
from opsd_train.reporting.intervals import bootstrap


class GradedSample(TypedDict):
    """A line of an evaluation's grades.jsonl; `reason`: why grading failed, else None."""

    set: str
    problem: str
    sample: int
    correct: bool
    answer: str | None
    boxed: bool
    finished: bool
    tokens: int
    reason: str | None


Problems = Sequence[Sequence[GradedSample]]  # the samples of each problem


def summarise(problems: Problems) -> dict[str, Any]:
    """Every score as {"value", "interval"}: mean over problems, and its 95 % bootstrap interval.

    With n samples of every problem:
    avg       share of right samples (avg@n)
    pass      {k: at least one of k samples is right}, k = 1..n
    majority  {k: the most frequent answer of k samples is right}, k = 1, 2, 4, ... and n
    format    share of samples that ended by themselves with an answer in the form asked for
    finished  share of samples that ended by themselves
    length    mean tokens of a sample
    "problems" and "samples" (n) are counts. Keys k are strings, as in JSON. Raises UserError where
    there are no problems, a problem twice, or different numbers of samples.
    """
    ordered = _ordered(problems)
    samples = len(ordered[0])
    passes = range(1, samples + 1)
    votes = [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]
    rows = []
    for problem in ordered:
        right = sum(sample["correct"] for sample in problem)
        rows.append(
            [
                right / samples,
                _mean([s["boxed"] and s["finished"] for s in problem]),
                _mean([s["finished"] for s in problem]),
                _mean([s["tokens"] for s in problem]),
                *(pass_at(samples, right, k) for k in passes),
                *(majority_at(problem, k) for k in votes),
            ]
        )
    values = np.array(rows, dtype=float)
    scores = [
        {"value": float(value), "interval": [float(low), float(high)]}
        for value, low, high in zip(values.mean(axis=0), *bootstrap(values), strict=True)
    ]
    tail = scores[4:]
    return {
        "problems": len(ordered),
        "samples": samples,
        "avg": scores[0],
        "pass": {str(k): score for k, score in zip(passes, tail[:samples], strict=True)},
        "majority": {str(k): score for k, score in zip(votes, tail[samples:], strict=True)},
        "format": scores[1],
        "finished": scores[2],
        "length": scores[3],
    }


def compare(one: Problems, two: Problems) -> dict[str, Any]:
    """Mean over problems of two's avg minus one's, and its 95 % paired bootstrap interval.

    With one sample of each problem also the counts "gained" (wrong, then right) and "lost". Raises
    UserError where the problems are not the same, or have different numbers of samples.
    """
    before, after = _ordered(one), _ordered(two)
    known, others = [_key(problem) for problem in before], [_key(problem) for problem in after]
    if known != others:
        odd = sorted(set(known) ^ set(others)) or [known[0]]
        raise UserError(
            f"only the same problems can be compared; of {len(known)} and {len(others)}, "
            f"{len(odd)} are in one evaluation only, such as {' '.join(odd[0])}"
        )
    shares = [[_mean([s["correct"] for s in p]) for p in side] for side in (before, after)]
    differences = np.array(shares[1]) - np.array(shares[0])
    low, high = bootstrap(differences[:, None])
    result = {
        "difference": float(differences.mean()),
        "interval": [float(low[0]), float(high[0])],
        "problems": len(before),
    }
    if len(before[0]) == len(after[0]) == 1:
        result["gained"] = int((differences > 0).sum())
        result["lost"] = int((differences < 0).sum())
    return result


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, interval) of each score, as text; pass@k for k = 1, 2, 4, ... and n only.

    With one sample pass@1 and majority@1 are avg@1, and are left out.
    """
    samples = summary["samples"]
    lines: list[tuple[str, dict[str, Any], Callable[[float], str]]]
    lines = [(f"avg@{samples}", summary["avg"], _percent)]
    for name in ("pass", "majority") if samples > 1 else ():
        lines += [(f"{name}@{k}", summary[name][k], _percent) for k in summary["majority"]]
    lines += [(name, summary[name], _percent) for name in ("format", "finished")]
    lines.append(("length", summary["length"], "{:,.0f}".format))
    return [
        (label, text(score["value"]), " to ".join(text(bound) for bound in score["interval"]))
        for label, score, text in lines
    ]


def pass_at(samples: int, right: int, k: int) -> float:
    """Chance that k of n samples include a right one, c of the n being right.

    1 - C(n-c, k) / C(n, k): equation 1 of Chen et al., Evaluating Large Language Models Trained on
    Code (2021).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at(problem: Sequence[GradedSample], k: int) -> float:
    """Chance that the most frequent answer of k of the samples is right: exact, over all subsets.

    Answers are the same if `finding.normalise` gives the same text, and right if one of them was
    graded right (grades of the same text differ only where grading failed). Tied answers share the
    vote equally; a sample without an answer does not vote.
    """
    counts: Counter[str] = Counter()
    right = set()
    for sample in problem:
        if sample["answer"] is not None:
            answer = normalise(sample["answer"])
            counts[answer] += 1
            if sample["correct"]:
                right.add(answer)
    groups = tuple(sorted((count, answer in right) for answer, count in counts.items()))
    return _majority(groups, len(problem) - counts.total(), k)


@lru_cache(maxsize=10_000)  # many problems have the same counts
def _majority(groups: tuple[tuple[int, bool], ...], silent: int, k: int) -> float:
    """majority_at from the (count, right) of each answer, and `silent` samples without an answer.

    A right answer with t votes wins if no other has more than t; if m others have t, its share is
    1 / (m + 1). The ways to pick the other k - t samples are counted by multiplying polynomials:
    ways[m, j] is the number of ways to pick j samples so that m answers have t and none has more.
    """
    total = 0.0
    for place, (count, right) in enumerate(groups):
        if not right:
            continue
        others = [size for other, (size, _) in enumerate(groups) if other != place]
        for votes in range(1, min(count, k) + 1):
            rest = k - votes
            ways = np.zeros((rest // votes + 1, rest + 1))
            ways[0] = _picks(silent, rest, rest)
            for size in others:
                more = np.zeros_like(ways)
                for ties, row in enumerate(ways):
                    more[ties] += np.convolve(row, _picks(size, votes - 1, rest))[: rest + 1]
                    if size >= votes and ties + 1 < len(ways):
                        more[ties + 1, votes:] += math.comb(size, votes) * row[: rest + 1 - votes]
                ways = more
            shares = ways[:, rest] / np.arange(1, len(ways) + 1)
            total += math.comb(count, votes) * shares.sum()
    samples = silent + sum(size for size, _ in groups)
    return total / math.comb(samples, k)


def _picks(size: int, most: int, length: int) -> list[float]:
    """C(size, j) for j = 0..length, and 0 above `most`."""
    return [float(math.comb(size, j)) if j <= most else 0.0 for j in range(length + 1)]


def _ordered(problems: Problems) -> list[Sequence[GradedSample]]:
    """Sorted by set and id, so that sums do not depend on the order of the input."""
    if not problems:
        raise UserError("there are no problems to score")
    counts = {len(problem) for problem in problems}
    if len(counts) > 1 or 0 in counts:
        low, high = min(counts), max(counts)
        raise UserError(
            f"every problem needs as many samples; there are some with {low} and {high}"
        )
    ordered = sorted(problems, key=_key)
    for first, second in pairwise(ordered):
        if _key(first) == _key(second):
            raise UserError(f"problem {' '.join(_key(first))} is there twice")
    return ordered


def _key(problem: Sequence[GradedSample]) -> tuple[str, str]:
    return problem[0]["set"], problem[0]["problem"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
