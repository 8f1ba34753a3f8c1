"""A study of a tiny model from its recipes to its page; what is finished is not run again."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from benchmarks.study import run as study_run
from benchmarks.study.settings import Experiment, Shared
from benchmarks.study.subprocesses import Ended, Subprocess
from opsd_train import cli
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from
from opsd_train.reporting.metrics_log import read_rows
from tests.helpers import tiny

TASK = "data.task_config={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"
SIZE = {"seeds": [0, 1], "changes": ["steps=2", "evaluation.every=1"], "memory_tokens": [8, 16]}
TEXTS = {key: "…" for key in ("title", "paper", "paper_says", "question")}
BASE = {"name": "base", "label": "before", "base_model": True}
OPSD = {"name": "opsd", "label": "OPSD"}
SFT = {"name": "sft", "label": "SFT", "changes": ["method=sft"]}
EXPERIMENTS = {
    "methods": {"arms": [BASE, SFT, OPSD], "contrasts": [["opsd", "sft"], ["opsd", "base"]]},
    "length": {
        "kind": "passk",
        "arms": [BASE, OPSD],
        "contrasts": [["opsd", "base"]],
        "sampling": {"samples": 2, "max_new_tokens": 4, "temperature": 1.0},
    },
}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a study that `study_run.study` runs on the tiny model."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe(tiny.save_model(tmp_path / "model"), "unused")))
    shared = {
        "output_dir": str(tmp_path / "study"),
        "recipe": str(recipe),
        "tasks": {"sums": {"label": "sums", "changes": [TASK]}},
        "experiments": list(EXPERIMENTS),
        "full": SIZE,
        "quick": SIZE | {"seeds": [0]},
    }
    experiments = {n: config_from(TEXTS | e, cls=Experiment) for n, e in EXPERIMENTS.items()}
    monkeypatch.setattr(study_run, "load_shared", lambda: config_from(shared, cls=Shared))
    monkeypatch.setattr(study_run, "load_experiments", lambda _: experiments)
    return tmp_path / "study-quick"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def evaluations(folder: Path, run: str) -> list[dict]:
    return read_rows(folder / "runs" / run / "evaluations.jsonl")


@pytest.mark.slow
def test_from_recipes_to_page_and_on(study: Path) -> None:
    assert study_run.study(quick=True, only=["methods"], jobs=2) == 0
    found = results(study)
    assert {name: run["status"] for name, run in found["runs"].items()} == {
        "sums-sft-s0": "finished",
        "sums-opsd-s0": "finished",
    }
    for run in found["runs"].values():
        assert [row["step"] for row in run["evaluations"]] == [0, 1, 2]
        assert run["start"] == "sums-opsd-s0"  # which evaluated what both start from
        assert not list((study / "runs").glob("*/checkpoints"))
    sft, opsd = (evaluations(study, f"sums-{name}-s0") for name in ("sft", "opsd"))
    assert [row["step"] for row in sft] == [1, 2] and [row["step"] for row in opsd] == [0, 1, 2]
    shared = found["runs"]["sums-sft-s0"]["evaluations"]
    assert shared == [{k: v for k, v in opsd[0].items() if k != "divergence"}, *sft]
    assert [s["status"] for s in found["samplings"].values()] == ["missing", "missing"]
    assert (study / "study.html").stat().st_size > 10_000

    stamps = {path: path.stat().st_mtime_ns for path in study.glob("runs/*/metrics.jsonl")}
    assert study_run.study(quick=True, jobs=2) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # not run again
    found = results(study)
    for sampled in found["samplings"].values():
        assert sampled["status"] == "finished"
        assert sampled["scores"]["samples"] == 2 and sampled["scores"]["problems"] == 6
        assert len(sampled["correct"]) == 6

    os.replace(study / "runs" / "sums-sft-s0" / "summary.json", study / "gone.json")  # as if killed
    assert study_run.study(quick=True, jobs=1) == 0
    assert results(study)["runs"]["sums-sft-s0"]["status"] == "finished"


def in_this_process(jobs: Sequence[Subprocess], count: int) -> Iterator[Ended]:
    """As run_subprocesses, one after the other, without a process that imports all for each."""
    for job in jobs:
        yield Ended(job, cli.main(job.argv), 0.0)


def test_a_failed_run_is_told_and_does_not_stop_the_others(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_run, "run_subprocesses", in_this_process)
    (study / "runs" / "sums-sft-s0").mkdir(parents=True)
    (study / "runs" / "sums-sft-s0" / "config.yaml").mkdir()  # cannot be written
    assert study_run.study(quick=True, only=["methods"], jobs=1) == 1
    assert "failed: sums-sft-s0" in capsys.readouterr().err
    found = results(study)
    assert found["runs"]["sums-opsd-s0"]["status"] == "finished"
    assert found["runs"]["sums-sft-s0"]["status"] != "finished"


def test_other_settings_in_the_same_folder_are_refused(study: Path) -> None:
    (study / "plan").mkdir(parents=True)
    (study / "plan" / "sums-opsd-s0.yaml").write_text("steps: 7\n")
    with pytest.raises(UserError, match=r"sums-opsd-s0 has now.*--out"):
        study_run.study(quick=True)


def test_unknown_experiment(study: Path) -> None:
    with pytest.raises(UserError, match="did you mean methods"):
        study_run.study(quick=True, only=["method"])
