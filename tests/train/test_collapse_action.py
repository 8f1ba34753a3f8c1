"""A run that is made to collapse: it is warned of, stopped, or goes back to its best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsd_train import run
from opsd_train.checkpoint.export import export
from opsd_train.config.errors import UserError
from opsd_train.evaluation.accuracy import Evaluation
from opsd_train.evaluation.heldout import HeldOut
from opsd_train.evaluation.source import find_source
from tests.helpers.tiny import config
from tests.helpers.verdicts import made_up

# A model that learns from all of its own samples, drawn at a low temperature, settles on a few.
COLLAPSING = (
    *("method=star", "steps=30", "optim.lr=0.03", "optim.warmup_steps=20", "lora.rank=16"),
    *("lora.alpha=64", "lora.target_modules=all-linear", "evaluation.every=3"),
    "rollout.temperature=0.6",
    *("collapse.first_steps=4", "evaluation.teacher=false", "checkpoint.every=0"),
    "checkpoint.keep=1",
)
ACCURACY = {0: 2, 3: 5, 6: 5, 9: 3}  # right answers of six, by step; 1 later


@pytest.fixture
def accuracies(monkeypatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda folder: None)
    evaluate = HeldOut.evaluate

    def made(self: HeldOut, side: str) -> Evaluation:
        found, right = evaluate(self, side), ACCURACY.get(self._method.step_done, 1)
        correct = [index < right for index in range(len(found.correct))]
        return Evaluation(found.completions, correct, found.reasons)

    monkeypatch.setattr(HeldOut, "evaluate", made)


@pytest.fixture
def known_step(monkeypatch) -> None:
    """The method knows the number of steps that are done."""
    original = run.TrainingRun.evaluate

    def evaluate(self) -> None:
        self.trainer.method.step_done = self.trainer.steps_done
        original(self)

    monkeypatch.setattr(run.TrainingRun, "evaluate", evaluate)


def train(folder: Path, model: Path, action: str, *overrides: str) -> dict:
    made = config(model, folder, *COLLAPSING, f"collapse.action={action}", *overrides)
    with made_up(lambda answer: True):
        assert run.train(made) == 0
    return json.loads((folder / "summary.json").read_text())


def warned(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["warnings"]]


def test_a_run_stops_and_goes_on_if_asked(
    tiny_folder: Path, tmp_path: Path, accuracies, known_step
) -> None:
    folder = tmp_path / "run"
    stop = train(folder, tiny_folder, "stop")
    first = stop["steps"]
    assert stop["status"] == "stopped" and warned(folder) == [first]
    assert 6 < first < 25, "the model should be ruined in the middle"
    assert stop["after"]["correct"] == ACCURACY.get(first, 1) and "weights_of_step" not in stop
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{first:06d}"]

    made = config(tiny_folder, folder, *COLLAPSING, "collapse.action=warn")
    with made_up(lambda answer: True):
        assert run.train(made, resume=True) == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 30 > first


def test_a_run_goes_back_to_its_best_checkpoint(
    tiny_folder: Path, tmp_path: Path, accuracies, known_step, capsys
) -> None:
    best = train(tmp_path / "best", tiny_folder, "best")
    (first,) = warned(tmp_path / "best")
    assert (best["status"], best["steps"]) == ("stopped", first)
    assert best["weights_of_step"] == 3 and best["after"]["correct"] == 5  # the first of equals
    assert best["paired"]["difference"] == pytest.approx((5 - 2) / 6)  # of these weights
    kept = sorted(path.name for path in (tmp_path / "best" / "checkpoints").iterdir())
    assert kept == ["step_000003", f"step_{first:06d}"]
    assert (
        f"stopped after step {first} by the warning above; the weights are those of step 3, "
        in (capsys.readouterr().out.replace("\n", " "))
    )
    # The written adapter is that of step 3, bit for bit, and not what the run ended with.
    written, of_step, ended = (
        load_file(tmp_path / "best" / folder / "adapter_model.safetensors")
        for folder in (
            "adapter",
            "checkpoints/step_000003/adapter",
            f"checkpoints/{kept[1]}/adapter",
        )
    )
    assert all(torch.equal(written[name], of_step[name]) for name in written)
    assert not all(torch.equal(written[name], ended[name]) for name in written)
    # So are those that are evaluated or exported later.
    found = find_source(str(tmp_path / "best"), config(tiny_folder, tmp_path).model)
    assert found.weights == tmp_path / "best" / "checkpoints" / "step_000003"
    exported = load_file(export(tmp_path / "best") / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], of_step[name]) for name in of_step)
    # Once it has gone on from the newest, the newest counts.
    made = config(tiny_folder, tmp_path / "best", *COLLAPSING, "collapse.action=warn")
    with made_up(lambda answer: True):
        assert run.train(made, resume=True) == 0
    found = find_source(str(tmp_path / "best"), made.model)
    assert found.weights == tmp_path / "best" / "checkpoints" / "step_000030"


@pytest.mark.slow
def test_the_model_before_training_may_be_the_best(
    tiny_folder: Path, tmp_path: Path, accuracies, known_step, monkeypatch
) -> None:
    monkeypatch.setitem(ACCURACY, 0, 6)
    summary = train(tmp_path / "run", tiny_folder, "best")
    assert summary["weights_of_step"] == 0 and summary["after"]["correct"] == 6


def test_best_needs_evaluations(tiny_folder: Path, tmp_path: Path) -> None:
    for overrides in (("evaluation.every=0",), ("evaluation.problems=0",)):
        with pytest.raises(UserError, match=r"collapse\.action=best .*evaluation\.every"):
            config(tiny_folder, tmp_path, *COLLAPSING, "collapse.action=best", *overrides)
