"""rollout.ahead=1: samples of the weights one step earlier, generated while a step trains."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
import yaml

from opsd_train import cli
from opsd_train.config.errors import UserError
from opsd_train.trainer import Trainer
from tests.helpers.course import assert_same_course, rows
from tests.helpers.method_cases import chosen, double, log_probs
from tests.helpers.served_trainer import (
    BASE,
    STEPS,
    by_transformers,
    even,
    follow,
    make_trainer,
    put,
    served_by,
)
from tests.helpers.tiny import config, recipe
from tests.helpers.verdicts import made_up
from tests.helpers.vllm_double import VllmDouble, tiny

GRPO = (
    *("method=grpo", "rollout.samples_per_prompt=2", "updates_per_step=2", "curriculum={}"),
    *("grpo.mask_truncated=false", "grpo.normalise_std=false"),
)


def test_samples_are_of_the_weights_one_step_earlier(tiny_folder, tmp_path, doubles) -> None:
    trainer = make_trainer(tiny_folder, tmp_path, *served_by(*doubles))
    course = follow(trainer)
    assert [row["sample_age"] for row in course.rows] == [0, 1, 1, 1]
    for step, (rollout, row) in enumerate(zip(course.rollouts, course.rows, strict=True), 1):
        old, now = course.weights[max(step - 2, 0)], course.weights[step - 1]
        wanted = by_transformers(trainer, old, step)
        assert [s.completion for s in rollout.own] == [c.tokens for c in wanted]
        for sample, completion in zip(rollout.own, wanted, strict=True):
            assert sample.logprobs == pytest.approx(completion.logprobs, abs=1e-4)
        # The logged mismatch, from full logits in fp64 with the weights that the step began with.
        put(trainer, now)
        model, gaps = double(trainer.policy), []
        for sample in rollout.own:
            with torch.no_grad():
                own = log_probs(model, sample.student_prompt, sample.completion)
            gaps.append(chosen(own, sample.completion) - torch.tensor(sample.logprobs))
        mismatch = torch.cat(gaps).abs().mean().item()
        assert row["sampler_mismatch"] == pytest.approx(mismatch, rel=1e-3, abs=1e-5)
        assert (mismatch > 0.01) == (step > 1)  # the weights changed enough to be told apart
    # One sync before each generation, none for the last step; each sample was asked for once.
    for double_ in doubles:
        loads = [event for event in double_.events if event.startswith("load")]
        assert len(loads) == 1 + STEPS - 1
    assert sum(len(double_.bodies) for double_ in doubles) == 2 * 2 + 4 * STEPS


def test_grpo_weights_what_is_old(tiny_folder, tmp_path, doubles) -> None:
    trainer = make_trainer(tiny_folder, tmp_path, *GRPO, *served_by(*doubles))
    course = follow(trainer)
    assert [row["sample_age"] for row in course.rows] == [0, 2, 2, 2]  # two updates a step
    fresh, *later = [row["importance"] for row in course.rows if "importance" in row]
    assert fresh == pytest.approx(1, abs=1e-4) and all(abs(value - 1) > 1e-3 for value in later)
    assert later


def test_the_next_samples_come_while_a_step_trains(tiny_folder, tmp_path, doubles) -> None:
    trainer = make_trainer(tiny_folder, tmp_path, *served_by(*doubles))
    loss, seen = trainer.method.loss, []

    def noting(*args: Any) -> Any:
        for double_ in doubles:
            double_.wait_for(2)
        seen.append(True)
        return loss(*args)

    trainer.method.loss = noting

    answered, own = [], tiny()

    def answer(body: dict, adapter: str | None) -> Any:
        """The second step's samples only while the first one trains."""
        while len(answered) >= 4 and not seen:
            time.sleep(0.01)
        answered.append(body)
        return own(body, adapter)

    for double_ in doubles:
        double_.answer = answer
    row, _ = trainer.step(1)
    assert seen and row["loss"] > 0
    assert len(trainer.rollouts.state()["completions"]) == 4 and len(answered) == 8


def run(folder: Path, name: str, *words: str) -> int:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(folder / "model", folder / name)))
    return cli.main([str(path), *BASE, "checkpoint.every=2", *words])


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With the tiny model; no reports, which take half of a run's time."""
    monkeypatch.setattr("opsd_train.run.write_report", lambda _: None)
    (tmp_path / "model").symlink_to(tiny_folder)
    with made_up(even):
        yield tmp_path


METHODS = {
    "opsd": ("lora.dropout=0.3",),
    "sampled token": ("loss.objective=sampled_token",),
    "grpo, curriculum": (*GRPO, "rollout.temperature=1.3"),
}


@pytest.mark.parametrize(
    "method, how", [*zip(METHODS, ["killed", "SIGTERM", "killed"], strict=True)]
)
def test_a_resumed_run_takes_the_same_steps(folder, monkeypatch, method, how) -> None:
    """Evaluations in between: they wait for the pending samples and change nothing."""
    words = (*METHODS[method], "evaluation.problems=2", "evaluation.every=1")
    straight, first, second = (VllmDouble(tiny()) for _ in range(3))
    assert run(folder, "straight", *words, *served_by(straight)) == 0
    step = Trainer.step

    def ending(trainer: Trainer, number: int) -> Any:
        if number == 3 and how == "killed":
            raise MemoryError
        if number == 2 and how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", ending)
        if how == "killed":
            with pytest.raises(MemoryError):
                run(folder, "run", *words, *served_by(first))
        else:
            assert run(folder, "run", *words, *served_by(first)) == 143
    asked = [len(double_.bodies) for double_ in (straight, first)]
    assert run(folder, "run", *words, *served_by(second), "--resume") == 0
    assert_same_course(folder / "run", folder / "straight")
    found = rows(folder / "run")
    assert [row["sample_age"] > 0 for row in found] == [False, True, True, True]
    assert sum(row["grad_norm"] > 0 for row in found) >= 3
    # The samples of step 3 came out of the checkpoint: only those of step 4 were asked for.
    samples = 8 if method.startswith("grpo") else 4
    trained_on = [b for b in second.bodies if b["seed"] and b["max_tokens"] == 5]
    assert len(trained_on) == samples and asked[1] < asked[0]
    for double_ in (straight, first, second):
        double_.kill()


def test_evaluations_are_of_the_present_weights(folder, doubles) -> None:
    """As those of a run without servers whose steps have the same weights: before and after 1."""
    words = ("evaluation.problems=6", "evaluation.every=1", "evaluation.max_new_tokens=9")
    assert run(folder, "own", *words) == 0
    assert run(folder, "ahead", *words, *served_by(*doubles)) == 0
    own, ahead = (rows(folder / name, "evaluations.jsonl") for name in ("own", "ahead"))
    for one, other in zip(own[:2], ahead[:2], strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-3)
        assert one["length"] == other["length"]
    assert abs(own[0]["divergence"] - own[1]["divergence"]) > 1e-3
    one, other = (rows(folder / name) for name in ("own", "ahead"))
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-3)
    assert abs(one[1]["loss"] - other[1]["loss"]) > 1e-4  # on other samples
    assert "sample_age" not in one[0]


def test_servers_that_die_in_the_background(folder, doubles, capsys) -> None:
    """One line at the next step; what the steps before learnt is in the checkpoint."""
    for double_ in doubles:
        double_.answer = dies_after(doubles, 2 * 2 + 4 + 4)  # checks and two steps: in step 3's
    assert run(folder, "broken", *served_by(*doubles)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: no vLLM server is left (http://") and "--resume" in line
    assert [row["step"] for row in rows(folder / "broken")] == [1, 2]
    fresh = VllmDouble(tiny())
    assert run(folder, "broken", *served_by(fresh), "--resume") == 0
    assert "resuming after step 2" in capsys.readouterr().out
    found = rows(folder / "broken")
    assert [row["sample_age"] for row in found] == [0, 1, 0, 1]
    assert run(folder, "straight", *served_by(fresh)) == 0
    fresh.kill()
    wanted = rows(folder / "straight")
    assert [row["loss"] for row in found[:2]] == [row["loss"] for row in wanted[:2]]
    assert questions(folder / "broken") == questions(folder / "straight")


def questions(run_folder: Path) -> list[list[str]]:
    """The problems that the steps with a table of samples drew."""
    found = rows(run_folder, "samples.jsonl")
    return [[row["problem"] for row in found if row["step"] == step] for step in (1, 2, 4)]


def dies_after(doubles: list[VllmDouble], count: int) -> Callable[..., Any]:
    """An answer that kills the servers instead, once they have given `count`."""
    own = tiny()

    def answer(body: dict, adapter: str | None) -> Any:
        if sum(len(double_.bodies) for double_ in doubles) >= count:
            for double_ in doubles:
                double_.kill()
        return own(body, adapter)

    return answer


def test_a_refused_request_is_raised_at_the_next_step(tiny_folder, tmp_path, doubles) -> None:
    trainer = make_trainer(tiny_folder, tmp_path, *served_by(*doubles))
    make = trainer.trajectories.make

    def refusing(*args: Any) -> Any:
        made = make(*args)
        for double_ in doubles:
            double_.max_model_len = 10
        return made

    trainer.trajectories.make = refusing
    row, _ = trainer.step(1)
    assert row["loss"] > 0
    with pytest.raises(UserError, match=r"refused a request \(HTTP 400\): maximum context length"):
        trainer.step(2)
    trainer.close()


def test_a_server_that_dies_in_the_background_loses_nothing(
    tiny_folder, tmp_path, doubles, capsys
) -> None:
    undisturbed = follow(make_trainer(tiny_folder, tmp_path / "one", *served_by(doubles[0])))
    broken, own = VllmDouble(tiny()), tiny()

    def answer(body: dict, adapter: str | None) -> Any:
        if len(broken.bodies) >= 2 + 2:  # two checks and half of step 1: in step 2's
            broken.wait_for(2)  # who connects later is refused
            broken.kill()
        return own(body, adapter)

    broken.answer = answer
    trainer = make_trainer(tiny_folder, tmp_path / "two", *served_by(doubles[1], broken))
    course = follow(trainer)
    assert [row["loss"] for row in course.rows] == [row["loss"] for row in undisturbed.rows]
    assert capsys.readouterr().out.count(f"{broken.url} is gone: connection lost") == 1


def test_the_end_does_not_wait_for_samples(tiny_folder, tmp_path, doubles, capsys) -> None:
    """As after a second Ctrl-C: requests end, nothing is said, no thread is left."""
    trainer = make_trainer(tiny_folder, tmp_path, *served_by(*doubles))
    make = trainer.trajectories.make

    def holding(*args: Any) -> Any:
        made = make(*args)
        for double_ in doubles:
            double_.held.set()
        return made

    trainer.trajectories.make = holding
    trainer.step(1)
    for double_ in doubles:
        double_.wait_for(2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.step(2)
    finally:
        signal.signal(signal.SIGINT, before)
    trainer.close()
    assert time.perf_counter() - start < 5
    assert "is gone" not in capsys.readouterr().out
    assert not any(thread.is_alive() for thread in trainer.trajectories.engine._thread._threads)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollout.ahead=2",), "rollout.ahead: should be 0 or 1, got 2"),
        (("rollout.ahead=1",), "rollout.ahead=1 needs rollout.engine=vllm-server.*transformers"),
        (("rollout.ahead=1", "rollout.engine=vllm"), "this recipe has vllm: set rollout.ahead=0"),
        (("method=sft", "SERVED"), "rollout.ahead must be 0: this recipe trains on solutions"),
        (
            ("method=distill", "distill.teacher=t", "distill.on_policy=false", "SERVED"),
            "rollout.ahead must be 0: this recipe trains on solutions",
        ),
        ((*GRPO, "grpo.importance_cap=null", "SERVED"), "set grpo.importance_cap, such as 2.0"),
        (
            ("loss.objective=sampled_token", "rollout.temperature=1.1", "SERVED"),
            "set rollout.temperature=loss.temperature, top_p=1 and top_k=0",
        ),
        (
            ("loss.objective=sampled_token", "rollout.top_k=20", "SERVED"),
            "set rollout.temperature=loss.temperature, top_p=1 and top_k=0",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, words: tuple[str, ...], message: str) -> None:
    served = ("rollout.engine=vllm-server", "rollout.servers=[http://a:1]", "rollout.ahead=1")
    given = [part for word in words for part in (served if word == "SERVED" else (word,))]
    with pytest.raises(UserError, match=message) as error:
        config("model", tmp_path, *given)
    assert "\n" not in str(error.value)


def test_whether_it_is_on_cannot_change(folder, doubles, capsys) -> None:
    assert run(folder, "run", *served_by(*doubles), "steps=2") == 0
    assert run(folder, "run", *served_by(*doubles, ahead=0), "--resume") == 2
    assert "rollout.ahead was 1 and is 0" in capsys.readouterr().err
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "finished"
