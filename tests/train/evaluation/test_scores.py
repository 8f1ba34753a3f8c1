"""Scores against the enumeration of every subset, and intervals against what is known of them."""

import json
import random
from collections import Counter
from fractions import Fraction
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest

from opsd_train.config.errors import UserError
from opsd_train.evaluation.finding import normalise
from opsd_train.evaluation.scores import GradedSample, compare, majority_at, rows, summarise
from opsd_train.reporting.intervals import bootstrap


def problem(name: str, answers: list[str | None], right: str = "5") -> list[GradedSample]:
    """Finished samples of 10, 20, ... tokens with these answers."""
    return [
        GradedSample(
            set="s",
            problem=name,
            sample=index,
            correct=answer is not None and normalise(answer) == right,
            answer=answer,
            boxed=answer is not None,
            finished=True,
            tokens=10 * (index + 1),
            reason=None,
        )
        for index, answer in enumerate(answers)
    ]


def some_problems(count: int, samples: int, seed: int = 0) -> list[list[GradedSample]]:
    """Problems from easy to hard, with a favourite wrong answer, and none in some samples."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        weights = [rng.random(), rng.random(), rng.random() / 2, rng.random() / 2, 0.2]
        made.append(
            problem(f"p{index}", rng.choices(["5", "6", "7", "8", None], weights, k=samples))
        )
    return made


def vote(chosen: tuple[GradedSample, ...]) -> Fraction:
    """The part of the most frequent answers of these samples that is right."""
    votes = Counter(s["answer"] for s in chosen if s["answer"] is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    right = {s["answer"] for s in chosen if s["correct"]}
    return Fraction(sum(a in right for a in winners), len(winners)) if winners else Fraction(0)


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_and_majority_are_means_over_all_subsets(samples: int) -> None:
    problems = some_problems(12, samples)
    summary = summarise(problems)
    assert [int(k) for k in summary["pass"]] == list(range(1, samples + 1))
    votes = {1: [1], 2: [1, 2], 5: [1, 2, 4, 5], 8: [1, 2, 4, 8]}
    assert [int(k) for k in summary["majority"]] == votes[samples]
    for k in range(1, samples + 1):
        passed, voted = [], []
        for one in problems:
            subsets = list(combinations(one, k))
            passed.append(mean([Fraction(any(s["correct"] for s in c)) for c in subsets]))
            voted.append(mean([vote(c) for c in subsets]))
            assert majority_at(one, k) == pytest.approx(float(voted[-1]), abs=1e-12)
        assert summary["pass"][str(k)]["value"] == pytest.approx(float(mean(passed)), abs=1e-12)
        if str(k) in summary["majority"]:
            found = summary["majority"][str(k)]["value"]
            assert found == pytest.approx(float(mean(voted)), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["5", "5", "6"], 1),
        (["5", "6", "6"], 0),
        (["5", "6"], 1 / 2),
        (["5", "6", "7"], 1 / 3),
        (["5", "5", "6", "6", "7"], 1 / 2),
        (["5", None, None, None], 1),
        ([None, None], 0),
        (["6", None], 0),
        ([" 5", "$5$", "6", "7"], 1),  # one answer in two spellings
        (["5"] * 40 + ["6"] * 24, 1),
    ],
)
def test_majority_of_all_samples(answers: list[str | None], expected: float) -> None:
    assert majority_at(problem("p", answers), len(answers)) == pytest.approx(expected)


def test_majority_of_many_samples_against_draws() -> None:
    """64 samples, 16 of them drawn: an enumeration would take 10^14 subsets."""
    one = problem("p", ["5"] * 22 + ["6"] * 20 + ["7"] * 12 + [None] * 10)
    rng = random.Random(0)
    draws = [float(vote(tuple(rng.sample(one, 16)))) for _ in range(20_000)]
    assert majority_at(one, 16) == pytest.approx(sum(draws) / len(draws), abs=0.015)


def test_a_group_is_right_if_one_of_it_was_graded_right() -> None:
    """The grading of the second sample failed; its answer is the first one's."""
    one = problem("p", ["5", "5", "6"])
    one[1] |= {"correct": False, "reason": "timeout"}
    assert majority_at(one, 3) == 1.0
    assert summarise([one])["avg"]["value"] == pytest.approx(1 / 3)


def test_values_by_hand() -> None:
    one, two = problem("a", ["5", "5", "6", None]), problem("b", ["6", "6", "5", "7"])
    one[0]["finished"] = False  # boxed, but cut off: not in the form asked for
    two[3]["boxed"] = False
    two[3]["tokens"] = 120
    summary = summarise([one, two])
    assert (summary["problems"], summary["samples"]) == (2, 4)
    values = {name: summary[name]["value"] for name in ("avg", "format", "finished", "length")}
    assert values == pytest.approx({"avg": 3 / 8, "format": 5 / 8, "finished": 7 / 8, "length": 35})
    assert summary["pass"]["2"]["value"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert summary["pass"]["4"]["value"] == 1.0
    assert summary["majority"]["4"]["value"] == pytest.approx(1 / 2)
    assert json.loads(json.dumps(summary)) == summary


def test_one_of_many_is_the_average() -> None:
    summary = summarise(some_problems(50, 16))
    assert summary["pass"]["1"]["value"] == pytest.approx(summary["avg"]["value"])
    assert summary["majority"]["1"]["value"] == pytest.approx(summary["avg"]["value"])
    passes = [score["value"] for score in summary["pass"].values()]
    assert passes == sorted(passes)


def test_order_changes_nothing() -> None:
    problems = some_problems(30, 8)
    rng = random.Random(1)
    mixed = [rng.sample(one, len(one)) for one in rng.sample(problems, len(problems))]
    assert summarise(mixed) == summarise(problems)
    other = some_problems(30, 8, seed=2)
    assert compare(mixed, other) == compare(problems, other)


def test_bootstrap_is_normal_for_many_problems() -> None:
    """For 2000 problems its bounds are mean -+ 1.96 standard errors, to within its own noise."""
    rng = np.random.default_rng(3)
    values = np.stack([rng.random(2000) < 0.3, rng.normal(5, 2, 2000)], axis=1).astype(float)
    reach = NormalDist().inv_cdf(0.975) * values.std(axis=0) / np.sqrt(2000)
    low, high = bootstrap(values)
    assert low == pytest.approx(values.mean(axis=0) - reach, abs=0.1 * reach.min())
    assert high == pytest.approx(values.mean(axis=0) + reach, abs=0.1 * reach.min())


def test_bootstrap_of_few_problems_is_exact() -> None:
    """Of 0 and 1 the resampled means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4; and constants."""
    low, high = bootstrap(np.array([[0.0, 7.0], [1.0, 7.0]]))
    assert (low.tolist(), high.tolist()) == ([0.0, 7.0], [1.0, 7.0])
    low, high = bootstrap(np.array([[0.25]]))
    assert (low[0], high[0]) == (0.25, 0.25)
    # 1 of 4 problems right: all four wrong in (3/4)^4 = 32 % of resamples, all right in 0.4 %,
    # three right in 4.7 %; so the bounds of 95 % are 0 and 3/4.
    low, high = bootstrap(np.array([[1.0], [0.0], [0.0], [0.0]]))
    assert (low[0], high[0]) == (0.0, 0.75)


def test_interval_is_over_problems_not_samples() -> None:
    """Samples that all agree within their problem tell no more than one of them would."""
    names = [("5" if index % 2 else "6", f"p{index}") for index in range(40)]
    single = summarise([problem(name, [answer]) for answer, name in names])
    many = summarise([problem(name, [answer] * 16) for answer, name in names])
    assert many["avg"] == single["avg"]
    low, high = many["avg"]["interval"]
    assert 0.3 < low < 0.4 and 0.6 < high < 0.7


def test_compare() -> None:
    """With one sample each, the interval is the paired one: narrower than that of two groups."""
    before = [problem(f"p{i}", ["5" if i < 40 else "6"]) for i in range(100)]
    after = [problem(f"p{i}", ["5" if 5 <= i < 70 else "6"]) for i in range(100)]
    result = compare(before, after)
    assert (result["problems"], result["gained"], result["lost"]) == (100, 30, 5)
    assert result["difference"] == pytest.approx(0.25)
    deviation = (0.35 - 0.25**2) ** 0.5 / 10
    assert result["interval"] == pytest.approx(
        [0.25 - 1.96 * deviation, 0.25 + 1.96 * deviation], abs=0.015
    )
    backwards = compare(after, before)
    assert backwards["difference"] == pytest.approx(-0.25)
    assert (backwards["gained"], backwards["lost"]) == (5, 30)
    assert compare(before, before)["interval"] == [0.0, 0.0]


def test_compare_over_several_samples() -> None:
    before = [problem(f"p{i}", ["5", "6"]) for i in range(10)]
    after = [problem(f"p{i}", ["5", "5", "6", "5"]) for i in range(10)]
    result = compare(before, after)
    assert result == {"difference": 0.25, "interval": [0.25, 0.25], "problems": 10}


def test_bad_input() -> None:
    five = [problem(f"p{i}", ["5"]) for i in range(5)]
    with pytest.raises(UserError, match="no problems to score"):
        summarise([])
    with pytest.raises(UserError, match="there are some with 1 and 2"):
        summarise([*five, problem("q", ["5", "6"])])
    with pytest.raises(UserError, match="there are some with 0 and 1"):
        summarise([*five, []])
    with pytest.raises(UserError, match="problem s p0 is there twice"):
        summarise([*five, five[0]])
    with pytest.raises(UserError, match="of 5 and 4, 1 are in one evaluation only, such as s p4"):
        compare(five, five[:4])


def test_rows() -> None:
    lines = rows(summarise(some_problems(20, 8)))
    labels = [label for label, *_ in lines]
    assert labels[:5] == ["avg@8", "pass@1", "pass@2", "pass@4", "pass@8"]
    assert labels[5:] == [f"majority@{k}" for k in (1, 2, 4, 8)] + ["format", "finished", "length"]
    assert lines[-2] == ("finished", "100.0 %", "100.0 % to 100.0 %")
    assert lines[-1] == ("length", "45", "45 to 45")
    single = [label for label, *_ in rows(summarise(some_problems(20, 1)))]
    assert single == ["avg@1", "format", "finished", "length"]
