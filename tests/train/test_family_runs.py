"""Whole steps and runs of the recipes around OPSD: contexts, shares of steps, resumed teachers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd_train import run
from opsd_train.trainer import Trainer
from tests.helpers.pair import alone
from tests.helpers.steps import Course, make_trainer
from tests.helpers.tiny import config
from tests.helpers.verdicts import made_up

SDPO = (
    *("rollout.samples_per_prompt=3", "prompts.teacher_context=[sibling, feedback]"),
    "prompts.teacher={{ problem.question }} {{ sibling or '' }} {{ feedback }}",
    *("evaluation.teacher=false", "evaluation.divergence=false", "grpo={mask_truncated: false}"),
    *("loss.weight=0.5", "prompts.max_prompt_tokens=250"),
)
GKD = ("method=distill", "distill.prompt=teacher", "distill.dtype=float32", "distill.on_policy=0.5")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def no_report(monkeypatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda folder: None)


def right(answer) -> bool:
    return sum(map(ord, answer.text)) % 2 == 1


def test_teachers_prompts_are_made_after_the_rollout(tiny_folder: Path) -> None:
    trainer = make_trainer(alone(), Course(tiny_folder.parent, tiny_folder.name, SDPO))
    trainer.grader.right = right
    row, stats = trainer.step(1)
    assert row["context_feedback"] == pytest.approx(1 - row["accuracy"])  # of the wrong ones
    assert 0 < row["context_sibling"] <= 1 and row["divergence"] > 0 and "groups_dropped" in row
    shown = stats.sample_rows(trainer.tokenizer, 12)
    with_sibling = [row for row in shown if row["teacher_sees"].startswith("sibling")]
    assert with_sibling
    for sample in with_sibling:
        own, others = sample["completion"], [r["completion"] for r in shown if r["correct"]]
        siblings = [text for text in others if text != own]
        assert any(f" {text} " in sample["teacher_prompt"] for text in siblings)


def test_steps_on_samples_and_on_solutions(tiny_folder: Path) -> None:
    """Each step is one or the other as a whole, by the seed; solutions are not graded."""

    def course(seed: int) -> tuple[list[bool], Trainer]:
        overrides = (*GKD, f"distill.teacher={tiny_folder}", f"seed={seed}")
        trainer = make_trainer(alone(), Course(tiny_folder.parent, tiny_folder.name, overrides))
        return [trainer.trajectories.on_solutions(step) for step in range(1, 401)], trainer

    drawn, trainer = course(0)
    assert 150 < sum(drawn) < 250 and drawn == course(0)[0] != course(1)[0]
    for step in (drawn.index(True) + 1, drawn.index(False) + 1):
        row, stats = trainer.step(step)
        on_solutions = trainer.trajectories.on_solutions(step)
        assert ("accuracy" not in row) == on_solutions and row["loss"] > 0
        shown = stats.sample_rows(trainer.tokenizer, 4)
        assert all((sample["correct"] is None) == on_solutions for sample in shown)
        solutions = {p.solution for p in trainer.problems}
        assert all((sample["completion"] in solutions) == on_solutions for sample in shown)


@pytest.mark.parametrize(
    "overrides",
    [
        ("opsd.teacher=resync", "opsd.resync_every=2", "lora=null"),
        ("opsd.teacher=resync", "opsd.resync_every=2", *SDPO),
    ],
    ids=["a copy of all weights", "contexts and a policy gradient"],
)
def test_a_resumed_run_goes_on_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, no_report, overrides: tuple[str, ...]
) -> None:
    common = (*overrides, "evaluation.problems=0", "checkpoint.every=1", "optim.lr=1e-3")

    def train(folder: str, steps: int, resume: bool = False) -> list[dict]:
        made = config(tiny_folder, tmp_path / folder, *common, f"steps={steps}")
        with made_up(right):
            assert run.train(made, resume=resume) == 0
        return rows(tmp_path / folder)

    straight = train("straight", 5)
    train("stopped", 3)
    resumed = train("stopped", 5, resume=True)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in straight]
    assert len({row["loss"] for row in straight}) > 2
