"""Statistics of a step against plain Python over the same numbers, on one rank and on several."""

import json
import math
import pickle
from dataclasses import replace

import pytest
import torch

from opsd_train.data.batches import Sample
from opsd_train.data.problems import Problem
from opsd_train.reporting.sample_table import largest, token_pieces
from opsd_train.reporting.step_stats import MAX_POSITIONS, StepStats
from tests.helpers.tiny import make_tokenizer

TOKENIZER = make_tokenizer()


def sample(name: str, text: str, **fields) -> Sample:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    return Sample(Problem(name, f"{name}?", "7", "7"), [1], [1, 2], tokens, **fields)


SAMPLES = [
    sample("b", "ab", logprobs=[-1.0, -2.0], correct=False, weight=0.0),
    sample("a", "abc7", logprobs=[-0.5, -0.25, -1.5, -3.0], correct=True, answer="7"),
    sample("a", "b"),
]
DIVERGENCE = [0.5, -0.25, 1.0, 2.0, 0.125, 0.0, 4.0]
LOGPROB = [-1.5, -2.0, -0.5, -0.5, -1.0, -2.0, -6.0]


def stats_of(samples, **columns) -> StepStats:
    stats = StepStats()
    stats.add(samples, torch.tensor(0.25), {k: torch.tensor(v) for k, v in columns.items()})
    return stats


def halves() -> StepStats:
    """The same from two ranks, one of them sent through pickle; a third rank is idle."""
    first = stats_of(SAMPLES[1:], divergence=DIVERGENCE[2:], student_logprob=LOGPROB[2:])
    second = stats_of(SAMPLES[:1], divergence=DIVERGENCE[:2], student_logprob=LOGPROB[:2])
    second.loss = 0.0
    first.merge([StepStats(), pickle.loads(pickle.dumps(second))])
    return first


def whole() -> StepStats:
    return stats_of(SAMPLES, divergence=DIVERGENCE, student_logprob=LOGPROB)


@pytest.mark.parametrize("made", [whole, halves])
def test_a_divergence_row(made):
    stats = made()
    assert stats.loss == 0.25
    row = stats.row(TOKENIZER)
    assert row.keys() == {
        "divergence",
        "divergence_by_position",
        "position_width",
        "top_tokens",
        "sampler_mismatch",
        "sampler_kl",
    }
    assert row["divergence"] == pytest.approx(sum(DIVERGENCE) / 7)
    assert row["position_width"] == 1
    expected = [(0.5 + 1.0 + 4.0) / 3, (-0.25 + 2.0) / 2, 0.125, 0.0]
    assert row["divergence_by_position"] == pytest.approx(expected)
    tops = {text: (pytest.approx(mean), count) for text, mean, count in row["top_tokens"]}
    assert tops == {"a": (0.75, 2), "b": ((2.0 - 0.25 + 4.0) / 3, 3), "c": (0.125, 1), "7": (0, 1)}
    assert [text for text, _, _ in row["top_tokens"]] == ["b", "a", "c", "7"]
    table = stats.sample_rows(TOKENIZER, 3)
    means = {(r["problem"], len(r["tokens"])): r["divergence"] for r in table}
    assert means == {("a", 4): 0.78125, ("a", 1): 4.0, ("b", 2): 0.125}


@pytest.mark.parametrize("made", [whole, halves])
def test_the_sampler_is_compared_where_it_said_something(made):
    sampled = [-1.0, -2.0, -0.5, -0.25, -1.5, -3.0]  # the last sample has no log-probs
    changes = [own - given for own, given in zip(LOGPROB, sampled, strict=False)]
    row = made().row(TOKENIZER)
    assert row["sampler_mismatch"] == pytest.approx(sum(map(abs, changes)) / 6)
    k3 = sum(math.exp(change) - 1 - change for change in changes) / 6
    assert row["sampler_kl"] == pytest.approx(k3)


def test_sampler_kl_estimates_kl_from_sampler_to_trainer():
    generator = torch.Generator().manual_seed(0)
    trainer, sampler = torch.randn(2, 6, generator=generator).log_softmax(-1)
    drawn = torch.multinomial(sampler.exp(), 40_000, replacement=True, generator=generator)
    one = Sample(Problem("p", "", "", ""), [1], None, drawn.tolist(), sampler[drawn].tolist())
    truth = (sampler.exp() * (sampler - trainer)).sum().item()
    assert stats_of([one], logprob=trainer[drawn].tolist()).mismatch()[
        "sampler_kl"
    ] == pytest.approx(truth, rel=0.05)


def test_what_is_not_known_counts_in_no_mean():
    """A token that the loss leaves out has no divergence: NaN."""
    nan = math.nan
    divergence = [0.5, nan, nan, 2.0, 0.125, nan, nan]
    logprob = [-1.5, -2.0, nan, -0.5, -1.0, -2.0, nan]
    stats = stats_of(SAMPLES, divergence=divergence, student_logprob=logprob)
    row = stats.row(TOKENIZER)
    assert row["divergence"] == pytest.approx((0.5 + 2.0 + 0.125) / 3)
    assert row["divergence_by_position"] == [0.5, 2.0, 0.125, None]
    assert row["top_tokens"] == [("b", 2.0, 1), ("a", 0.5, 1), ("c", 0.125, 1)]
    gaps = [-0.5, 0.0, -0.25, 0.5, 1.0]
    assert row["sampler_mismatch"] == pytest.approx(sum(map(abs, gaps)) / 5)
    first, second, _ = stats.sample_rows(TOKENIZER, 3)
    assert first["tokens"][1] == ["b", None] or second["tokens"][1] == ["b", None]
    nowhere = stats_of(SAMPLES, divergence=[nan] * 7, student_logprob=logprob)
    assert "divergence" not in nowhere.row(TOKENIZER)
    assert nowhere.sample_rows(TOKENIZER, 1)[0]["divergence"] is None
    json.dumps(nowhere.row(TOKENIZER), allow_nan=False)


def test_without_a_divergence_the_value_is_nll():
    clipped = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    stats = stats_of(SAMPLES, logprob=LOGPROB, clipped=clipped, kl=[0.1] * 7)
    row = stats.row(TOKENIZER)
    assert row["logprob"] == pytest.approx(sum(LOGPROB) / 7)
    assert row["clip_fraction"] == pytest.approx(2 / 7)
    assert row["kl"] == pytest.approx(0.1)
    assert row["nll_by_position"] == pytest.approx([8 / 3, 2.5 / 2, 1.0, 2.0])
    assert row["top_tokens"][0] == ("b", pytest.approx(8.5 / 3), 3)
    assert "divergence" not in row and "divergence_by_position" not in row
    assert stats.sample_rows(TOKENIZER, 1)[0]["nll"] == 1.0


def test_a_step_without_statistics():
    stats = StepStats()
    stats.add_unscored(SAMPLES[:1])
    assert stats.row(TOKENIZER) == {}
    [row] = stats.sample_rows(TOKENIZER, 4)
    assert row["completion"] == "ab" and "tokens" not in row and "divergence" not in row


def test_long_completions_share_entries():
    long = sample("p", "x" * (2 * MAX_POSITIONS + 2))
    values = torch.arange(len(long.completion)).tolist()
    width, means = stats_of([long], divergence=values).by_position()
    assert width == 4 and len(means) == MAX_POSITIONS // 2 + 1
    assert means[0] == 1.5 and means[-1] == 2 * MAX_POSITIONS + 0.5  # the last one is cut off


@pytest.mark.parametrize("made", [whole, halves])
def test_sample_rows(made):
    stats = made()
    stats.add(SAMPLES[:1], torch.tensor(0.0), {"divergence": torch.ones(2)})  # a second update
    rows = stats.sample_rows(TOKENIZER, 3)
    # One of each problem first, each sample once.
    assert [row["completion"] for row in rows] == ["abc7", "ab", "b"]
    assert rows[0] == {
        "problem": "a",
        "question": "a?",
        "answer": "7",
        "completion": "abc7",
        "extracted": "7",
        "correct": True,
        "trained": True,
        "divergence": 0.78125,
        "tokens": [["a", 1.0], ["b", 2.0], ["c", 0.125], ["7", 0.0]],
    }
    assert rows[1]["trained"] is False and rows[1]["extracted"] is None
    assert rows[2]["correct"] is None
    assert len(stats.sample_rows(TOKENIZER, 1)) == 1


def test_verdicts_that_come_after_the_passes():
    stats = stats_of([SAMPLES[2]], divergence=[4.0])
    stats.add_unscored([SAMPLES[0]])
    verdicts = [(SAMPLES[2], False, "b"), (SAMPLES[1], True, "7"), (SAMPLES[0], True, "a")]
    stats.set_verdicts([replace(s, correct=right, answer=answer) for s, right, answer in verdicts])
    rows = {row["completion"]: row for row in stats.sample_rows(TOKENIZER, 2)}
    assert {name: (r["correct"], r["extracted"]) for name, r in rows.items()} == {
        "ab": (True, "a"),
        "b": (False, "b"),
    }


def test_pieces_are_whole_characters():
    text = "é 語🍏!"
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    pieces = token_pieces(TOKENIZER, tokens, [float(i) for i in range(len(tokens))])
    assert pieces == [["é", 1.0], [" ", 2.0], ["語", 5.0], ["🍏", 9.0], ["!", 10.0]]


def test_pieces_of_broken_text():
    # A lead byte without its end, before a letter and at the end; then bytes that lead nowhere.
    lead = TOKENIZER.encode("é", add_special_tokens=False)[0]
    letter = TOKENIZER.encode("x", add_special_tokens=False)[0]
    for tokens in ([lead, letter, lead], [lead] * 9 + [letter]):
        pieces = token_pieces(TOKENIZER, tokens, [0.5] * len(tokens))
        assert "".join(text for text, _ in pieces) == TOKENIZER.decode(tokens)
    assert len(pieces) == 3


def test_the_largest_pieces():
    pieces = [["", value] for value in [0.5, 0.1, -2.0, 0.9, *[0.0] * 26]]
    assert largest(pieces) == {0, 3}  # two of thirty
    assert largest([["", -1.0], ["", 0.0]]) == set()
    assert largest([["", None]]) == set()
    assert len(largest([["", 1.0]] * 1000)) == 10
