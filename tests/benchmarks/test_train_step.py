"""The whole-step benchmark on a tiny model, through its processes; the work is the same."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.train_step import rounds
from benchmarks.train_step.__main__ import _options, main
from benchmarks.train_step.meters import OTHER, PHASES, Phases
from benchmarks.train_step.registry import CONTENDERS, OURS
from benchmarks.train_step.settings import Settings, command_of
from benchmarks.train_step.steps import StepHooks
from benchmarks.train_step.table import table
from benchmarks.train_step.worker import make
from benchmarks.train_step.workload import build
from benchmarks.worker_process import WorkerProcess
from opsd_train.methods import objective
from opsd_train.model import policy as policy_model
from opsd_train.rollout import Completion, trajectories
from tests.helpers.tiny import save_model

TOKENS, PROMPTS = 4, 16
FULL_LOGITS = "TRL SDFTTrainer, full logits"
# Each is a process that imports TRL; the other two differ from the second in options only.
TAKE_PART = {name: CONTENDERS[name] for name in (OURS, FULL_LOGITS)}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def result(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("out") / "deep" / "train_step.json"
    options = ["--tokens", str(TOKENS), "--steps", "1", "--model", tiny_folder]
    of_everybody = rounds._rounds

    def fewer(settings: Settings, steps: int, environment: dict, say: Callable) -> dict:
        """Memory is measured by the same code for all: ours is enough."""
        part = {OURS: TAKE_PART[OURS]} if environment else TAKE_PART
        with mock.patch.object(rounds, "CONTENDERS", part):
            return of_everybody(settings, steps, environment, say)

    with mock.patch.object(rounds, "_rounds", fewer):
        assert main([*options, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
def test_the_file_says_what_was_measured_and_where(result: dict) -> None:
    assert result["kind"] == "train_step"
    assert result["environment"]["versions"]["torch"]
    assert result["settings"]["tokens"] == TOKENS
    assert result["settings"]["micro_batch"] == PROMPTS // 2
    assert list(result["contenders"]) == list(TAKE_PART)


@pytest.mark.slow
def test_phases_are_parts_of_the_step(result: dict) -> None:
    pytest.importorskip("trl")
    for contender in result["contenders"].values():
        assert list(contender["phases"]) == [*PHASES, OTHER]
        assert all(seconds > 0 for (seconds,) in contender["phases"].values())
        (total,) = contender["seconds"]
        parts = sum(contender["phases"][name][0] for name in PHASES)
        assert parts < total == pytest.approx(parts + contender["phases"][OTHER][0])


@pytest.mark.slow
def test_everybody_works_on_the_same_number_of_tokens(result: dict) -> None:
    pytest.importorskip("trl")
    contenders = result["contenders"].values()
    assert {c["loss_tokens"] for c in contenders} == {TOKENS * PROMPTS}
    assert {tuple(c["setup"]["adapters"]) for c in contenders} == {("float32",)}
    assert all(0 < c["loss"][0] < 0.7 for c in contenders)


@pytest.mark.slow
def test_memory_is_measured_or_the_reason_given(result: dict) -> None:
    ours = result["contenders"][OURS]
    if ours["setup"]["memory_why_not"]:
        assert ours["peak_mib"] is None
    else:
        assert ours["peak_mib"] > ours["peak_extra_mib"] >= 0


@pytest.mark.slow
def test_the_table_names_who_is_missing(result: dict) -> None:
    absent = {name: {"why_not": "gone"} for name in CONTENDERS if name != OURS}
    text = table(result | {"contenders": result["contenders"] | absent})
    assert "student forward" in text and OURS in text
    assert f"{FULL_LOGITS}: gone" in text


@pytest.mark.slow
def test_a_worker_without_trl_says_how_to_get_it(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trl.py").write_text("raise ModuleNotFoundError('No module', name='trl')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerProcess(FULL_LOGITS, rounds.WORKER, [FULL_LOGITS], {}) as worker:
        worker.send("setup", **Settings(tokens=TOKENS, model=tiny_folder).as_json())
        assert worker.receive() == {"why_not": "trl is not installed: pip install -e .[bench]"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "0"], "--prompts: should be a whole number above 0, got '0'"),
        (["--model", "/nowhere/at/all"], "model.name_or_path=/nowhere/at/all"),
    ],
)
def test_bad_options_give_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(options) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(tokens=128, gradient_checkpointing=True), Settings(8, 32, 2, model="m")],
)
def test_the_recorded_command_measures_the_same_again(settings: Settings) -> None:
    command = command_of(settings.as_json() | {"micro_batch": 8})
    words = command.removeprefix("python -m benchmarks.train_step").split()
    assert _options(words)[0] == settings


def test_given_the_same_completions_the_losses_agree(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first update student and teacher are the base model under two prompts."""
    work = build(Settings(tokens=TOKENS, steps=1, model=tiny_folder), str(tmp_path))
    model = dataclasses.replace(work.config.model, dtype="float32", device="cpu")
    config = dataclasses.replace(work.config, model=model, steps=1)
    work = dataclasses.replace(work, config=config)
    made = {s.problem.id: [7 + i, 9, 11, 13 + i] for i, s in enumerate(work.samples)}
    for owner, name in ((policy_model, "completion_hidden"), (objective, "fused_linear_jsd")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back what `make` wraps
    completions = [made[sample.problem.id] for sample in work.samples]
    ours = make(OURS, work, Phases())
    answers = [Completion(tokens, [0.0] * TOKENS, finished=False) for tokens in completions]
    monkeypatch.setattr(ours.trainer.trajectories.engine, "generate", lambda *_: answers)
    # These completions were not sampled, so their log-probabilities are nobody's.
    monkeypatch.setattr(trajectories, "check_agreement", lambda *_: None)
    theirs = make(FULL_LOGITS, work, Phases())
    monkeypatch.setattr(theirs.trainer, "_generate", lambda prompts: (prompts, completions))
    losses = []
    for contender in (ours, theirs):
        contender.run(StepHooks(lambda: None, lambda step: losses.append(vars(step).copy())))
    assert losses[0]["loss_tokens"] == losses[1]["loss_tokens"] == TOKENS * PROMPTS
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-4)
