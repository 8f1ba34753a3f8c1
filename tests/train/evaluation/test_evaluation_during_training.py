"""Held-out evaluations between steps: their rows, what they leave alone, and after a resume."""

import json
from pathlib import Path

import pytest

from opsd_train.distributed.signals import StopRequest
from opsd_train.evaluation.accuracy import over_checkpoints
from opsd_train.reporting.intervals import wilson
from opsd_train.run import train
from tests.helpers.course import assert_same_course, rows, timeless
from tests.helpers.tiny import config

CHANGES = ("steps=5", "evaluation.every=2", "optim.lr=5e-2")


def evaluations(run: Path) -> list[dict]:
    return rows(run, "evaluations.jsonl")


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its start to its end, to compare others with."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config(tiny_folder, run, *CHANGES)) == 0
    return run


def test_rows_and_summary(whole: Path) -> None:
    run = whole
    found = evaluations(run)
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    tokens = {row["step"]: row["tokens"] for row in rows(run)}
    assert [row["tokens"] for row in found] == [0, tokens[2], tokens[4], tokens[5]]
    assert sorted(row["seconds"] for row in found) == [row["seconds"] for row in found]
    for row in found:
        right = row["correct"].count("1")
        assert len(row["correct"]) == row["problems"] == 6
        assert row["accuracy"] == right / 6 and row["interval"] == list(wilson(right, 6))
        assert row["divergence"] >= 0 and 1 <= row["length"] <= 5
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["accuracy"] == found[0]["accuracy"]
    assert summary["after"]["accuracy"] == found[-1]["accuracy"]
    assert summary["divergence_after"] == found[-1]["divergence"]
    assert summary["mean"]["checkpoints"] == 3 and summary["best"]["step"] in (2, 4, 5)


def test_evaluating_does_not_change_training(tiny_folder: Path, tmp_path: Path) -> None:
    for every in (0, 1):
        changes = (*CHANGES, f"evaluation.every={every}", "lora.dropout=0.1")
        train(config(tiny_folder, tmp_path / f"every-{every}", *changes))
    assert_same_course(tmp_path / "every-1", tmp_path / "every-0")
    assert [row["step"] for row in evaluations(tmp_path / "every-0")] == [0, 5]


def test_without_the_start_or_the_divergence(
    tiny_folder: Path, tmp_path: Path, whole: Path
) -> None:
    changes = (*CHANGES, "evaluation.at_start=false", "evaluation.divergence=false")
    train(config(tiny_folder, tmp_path / "less", *changes))
    assert_same_course(tmp_path / "less", whole)
    everything = [timeless(row) for row in evaluations(whole)]
    assert [timeless(row) for row in evaluations(tmp_path / "less")] == [
        {key: value for key, value in row.items() if key != "divergence"} for row in everything[1:]
    ]
    less, everything = (
        json.loads((run / "summary.json").read_text()) for run in (tmp_path / "less", whole)
    )
    gone = {"before", "teacher", "paired", "divergence_before", "divergence_after"}
    assert everything.keys() - less.keys() == gone
    for key in ("after", "best", "mean", "majority"):
        assert less[key] == everything[key]
    assert "Student after" in (tmp_path / "less" / "report.html").read_text()


@pytest.mark.parametrize(
    "stop", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_resumed_run_has_the_same_evaluations(
    tiny_folder: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stopped by a signal where an evaluation is due, where none is, and after the last step."""
    steps = iter(range(1, 6))
    with monkeypatch.context() as patch:
        patch.setattr(
            StopRequest,
            "signal",
            property(lambda _: 15 if next(steps, 0) == stop else None, _ignore),
        )
        assert train(config(tiny_folder, tmp_path / "run", *CHANGES)) == 143
    assert train(config(tiny_folder, tmp_path / "run", *CHANGES), resume=True) == 0
    run = tmp_path / "run"
    one, two = ([timeless(row) for row in evaluations(folder)] for folder in (run, whole))
    assert one == two
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    for key in ("before", "after", "best", "mean", "paired"):
        assert summaries[0][key] == summaries[1][key]


def _ignore(_: StopRequest, __: int | None) -> None:
    """The dataclass sets its default."""


def row(step: int, correct: str) -> dict:
    right, count = correct.count("1"), len(correct)
    interval = list(wilson(right, count))
    share = right / count
    return {
        "step": step,
        "accuracy": share,
        "interval": interval,
        "correct": correct,
        "problems": count,
    }


def test_best_and_mean_over_checkpoints() -> None:
    found = over_checkpoints([row(0, "1111"), row(5, "0111"), row(10, "0110"), row(15, "1011")])
    assert found["best"] == {
        "step": 5,  # not the model before training; the first of equals
        "accuracy": 0.75,
        "interval": list(wilson(3, 4)),
        "correct": 3,
        "problems": 4,
    }
    assert found["mean"] == {"accuracy": (0.75 + 0.5 + 0.75) / 3, "checkpoints": 3}
    assert found["paired"]["difference"] == -0.25
    assert (found["paired"]["gained"], found["paired"]["lost"]) == (0, 1)
    assert over_checkpoints([row(0, "1111")]) == {}
    assert over_checkpoints([row(0, "01"), row(9, "11")]).keys() == {"paired"}
    assert over_checkpoints([row(4, "01"), row(9, "11")]).keys() == {"best", "mean"}
    fewer = over_checkpoints([row(0, "0111"), row(9, "11")])  # resumed with fewer problems
    assert "paired" not in fewer
