"""Kinds of tokens on hand-made completions, and the diagnostics of a hand-made run folder."""

import json

import pytest

from benchmarks.study.diagnostics import diagnose, kinds

QUESTION = "State the sum of x and 41 :"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["First", ",", " we", " add"], ["style"] * 4),
        ([" 41", "-", "\n", " ", "<|im_end|>"], ["task", "task", "style", "style", "end"]),
        ([" The", " SUM", " is"], ["task", "task", "style"]),  # words of the question
        ([" su", "m", " su", "mmary"], ["task", "task", "style", "style"]),  # halves of words
        ([" y", " I"], ["task", "task"]),  # a letter may be a variable
        ([" <", "b", ">"], ["task", "task", "task"]),  # no special token
        ([" yes", " no"], ["task", "style"]),  # words of the answer
        (["=", "\N{MULTIPLICATION SIGN}", "≤"], ["task"] * 3),
        ([".", ":", "?", "…"], ["style"] * 4),
    ],
)
def test_kinds(pieces, expected):
    assert kinds([[piece, 0.5] for piece in pieces], QUESTION, "Yes") == expected


def run_folder(folder, name: str = "divergence"):
    metrics = [
        {"step": step, f"{name}_by_position": [1.0 / step, 0.5 / step], "position_width": 1}
        for step in range(1, 9)
    ]
    samples = [
        {
            "step": step,
            "question": QUESTION,
            "answer": "4",
            "completion": "",
            name: 0.5,
            "tokens": [["So", 0.6 / step], [" 4", 0.3 / step], ["<|im_end|>", 0.1], ["?", None]],
        }
        for step in range(1, 9)
    ]
    for file, rows in (("metrics", metrics), ("samples", samples)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{file}.jsonl").write_text(text)
    return folder


def test_positions_are_of_the_first_and_the_last_quarter(tmp_path):
    found = diagnose(run_folder(tmp_path))["position"]
    assert found["start"]["steps"] == [1, 2]
    assert found["end"]["steps"] == [7, 8]
    assert found["start"]["positions"] == [1, 2]
    assert found["start"]["means"] == pytest.approx([0.75, 0.375])
    assert found["end"]["means"] == pytest.approx(
        [(1 / 7 + 1 / 8) / 2, (1 / 7 + 1 / 8) / 4], abs=1e-6
    )


def test_shares_by_kind(tmp_path):
    found = diagnose(run_folder(tmp_path))["kinds"]
    assert found["all"]["count"] == 24  # a token without a number is left out
    assert found["all"]["of_tokens"] == pytest.approx({"task": 1 / 3, "style": 1 / 3, "end": 1 / 3})
    style, task, end = 0.6 * 1.5, 0.3 * 1.5, 0.2  # steps 1 and 2
    total = style + task + end
    truth = {"style": style / total, "task": task / total, "end": end / total}
    assert found["start"]["of_divergence"] == pytest.approx(truth)
    assert found["end"]["of_divergence"]["end"] > found["start"]["of_divergence"]["end"]


def test_tokens_are_ranked_by_their_mean(tmp_path):
    found = diagnose(run_folder(tmp_path))["tokens"]
    assert [(text, count, kind) for text, _, count, kind in found] == [
        ("So", 8, "style"),
        (" 4", 8, "task"),
        ("<|im_end|>", 8, "end"),
    ]
    assert found[2][1] == pytest.approx(0.1)


def test_it_is_json(tmp_path):
    found = diagnose(run_folder(tmp_path))
    assert json.loads(json.dumps(found)) == found


def test_no_divergence_no_diagnostics(tmp_path):
    assert diagnose(run_folder(tmp_path, "nll")) is None
    assert diagnose(tmp_path / "nothing") is None
