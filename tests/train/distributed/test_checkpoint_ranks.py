"""Checkpoints of two ranks: resumed bit for bit on two, gathered on one, none if a rank fails."""

import errno
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from opsd_train.checkpoint.resume import Checkpoints
from opsd_train.config.errors import UserError
from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import full_tensor
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.run import TrainingRun
from opsd_train.trainer import Trainer
from tests.helpers.course import timeless
from tests.helpers.pair import Pair, alone
from tests.helpers.tiny import config
from tests.helpers.verdicts import made_up
from tests.helpers.vllm_double import VllmDouble, tiny

pytestmark = pytest.mark.dist

DROPOUT = "lora={rank: 2, alpha: 4, dropout: 0.3, target_modules: [q_proj, down_proj]}"
EMA = "opsd={teacher: ema, ema_decay: 0.5}"
Tensors = dict[str, Tensor]


def make_run(
    context: DistributedContext, model: Path, folder: Path, overrides: list[str], shard: str
) -> TrainingRun:
    made = config(model, folder, "evaluation.problems=0", "steps=9", *overrides)
    with made_up():
        return TrainingRun(Trainer(made, context, RunFolder(folder, context), PhaseTimer(), shard))


def state(run: TrainingRun) -> Tensors:
    """Trained weights, optimizer state and the teacher's weights, gathered."""
    trainer = run.trainer
    tensors = dict(enumerate(trainer.policy.parameters)) | trainer.method.state()
    for index, parameter in enumerate(trainer.policy.parameters):
        entries = trainer.optimizer.state[parameter].items()
        tensors |= {f"{index}.{name}": value for name, value in entries}
    return {str(name): full_tensor(tensor.detach()).clone() for name, tensor in tensors.items()}


def step(run: TrainingRun) -> dict:
    row, _ = run.trainer.step(run.trainer.steps_done + 1)
    run.trainer.steps_done += 1
    return timeless(row)


def train(context: DistributedContext, *made_of) -> tuple[Tensors, dict, Tensors]:
    """A step, a checkpoint, another step: the state before and after it, and its metrics."""
    run = make_run(context, *made_of)
    step(run)
    run.save_checkpoint()
    return state(run), step(run), state(run)


def resume(context: DistributedContext, *made_of) -> tuple[Tensors, dict, Tensors]:
    run = make_run(context, *made_of)
    run.resume()
    assert run.trainer.steps_done == 1
    return state(run), step(run), state(run)


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shard, overrides", [("full", ["lora=null", EMA]), ("none", [DROPOUT])])
def test_goes_on(pair: Pair, models: Path, tmp_path: Path, capsys, shard, overrides) -> None:
    made_of = (models / "tied", tmp_path, overrides, shard)
    straight, resumed = pair.run(train, *made_of), pair.run(resume, *made_of)
    for (before, row, after), (before_again, row_again, after_again) in zip(
        straight, resumed, strict=True
    ):
        assert same(before, before_again) and same(after, after_again) and row == row_again
        assert not same(before, after) and before.keys() == after.keys()
    assert straight[0][1]["loss"] > 0

    # On another number of ranks: the same weights, but new random streams.
    before, row, _ = resume(alone(), *made_of)
    assert same(before, straight[0][0])
    assert "is of 2 processes and continues on 1" in capsys.readouterr().err
    if "lora=null" in overrides:  # nothing random is left
        assert row["loss"] == pytest.approx(straight[0][1]["loss"], rel=1e-4)


def test_goes_on_with_samples_a_step_ahead(pair: Pair, models: Path, tmp_path: Path) -> None:
    """On one rank too: it takes the samples that both ranks had been given."""
    double = VllmDouble(tiny())
    served = ["rollout.engine=vllm-server", f"rollout.servers=[{double.url}]", "rollout.ahead=1"]
    made_of = (models / "tied", tmp_path, [*served, "problems_per_step=5"], "full")
    (before, row, after), _ = pair.run(train, *made_of)
    (_, row_again, after_again), _ = pair.run(resume, *made_of)
    _, row_alone, after_alone = resume(alone(), *made_of)
    double.kill()
    assert row == row_again and same(after, after_again) and not same(before, after)
    assert row["sample_age"] == row_alone["sample_age"] == 1
    for name in ("loss", "grad_norm", "sampler_mismatch", "completion_length"):
        assert row_alone[name] == pytest.approx(row[name], rel=1e-4), name
    for name, weight in after.items():
        assert (weight - after_alone[name]).abs().max() < 2e-4, name


def save(context: DistributedContext, folder: Path, number: int, failing: str | None) -> str | None:
    """Save on both ranks while rank 1's disk is full; returns the error message."""

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(folder, 2, context)
    arguments = (number, {"w": torch.ones(5)}, {}, {"rank": context.rank}, "steps: 1")
    if failing is None or context.rank == 0:
        try:
            checkpoints.save(*arguments)
        except UserError as error:
            return str(error)
        return None
    with mock.patch(failing, full_disk), pytest.raises(UserError) as caught:
        checkpoints.save(*arguments)
    return str(caught.value)


def load(context: DistributedContext, folder: Path) -> tuple[int, int]:
    loaded = Checkpoints(folder, 2, context).newest("steps: 1")
    return loaded.step, loaded.rank_states[context.rank]["rank"]


def test_a_full_disk_on_one_rank_and_a_damaged_file(pair: Pair, tmp_path: Path) -> None:
    for number in (1, 2):
        assert pair.run(save, tmp_path, number, None) == [None, None]
    for failing in ("torch.save", "os.fsync"):
        told = pair.run(save, tmp_path, 3, failing)
        assert all("step_000003: No space left on device" in text for text in told)
        found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert found == ["step_000001", "step_000002"]
    assert pair.run(load, tmp_path) == [(2, 0), (2, 1)]
    os.truncate(tmp_path / "checkpoints" / "step_000002" / "rank_1.pt", 40)
    assert pair.run(load, tmp_path) == [(1, 0), (1, 1)]
