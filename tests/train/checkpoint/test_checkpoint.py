"""Checkpoints: resumed bit for bit; damaged files, full disks and changed recipes."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from opsd_train import cli
from opsd_train.checkpoint.resume import Checkpoints, restore_training
from opsd_train.checkpoint.save import training_tensors
from opsd_train.checkpoint.weights import save_adapter, save_weights
from opsd_train.config import schema
from opsd_train.config.errors import UserError
from opsd_train.config.load import to_yaml
from opsd_train.distributed.context import DistributedContext
from opsd_train.model.adapters import add_adapters
from opsd_train.model.policy import Policy
from opsd_train.run import train
from opsd_train.trainer import Trainer
from tests.helpers.course import assert_same_course
from tests.helpers.tiny import config, make_model, make_tokenizer

ALONE = DistributedContext(torch.device("cpu"))
RECIPE = "steps: 3\noptim: {lr: 0.01, schedule: constant}\n"
TENSORS = {"model": {"w": torch.arange(3000.0)}, "groups": [{"lr": 0.1}]}


class Training:
    """A tiny policy with its optimizer; a training step has random gradients."""

    def __init__(self, full: bool = False) -> None:
        model = make_model()
        if not full:
            lora = schema.LoraConfig(rank=2, alpha=4, target_modules=["q_proj", "down_proj"])
            model = add_adapters(model, lora)
        self.policy = Policy(model, 0, torch.float32)
        self.optimizer = torch.optim.AdamW(self.policy.parameters, lr=1e-2, weight_decay=0.1)
        self.average = {"average.0": torch.zeros(3)}
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=10)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in self.policy.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average["average.0"] += number

    def tensors(self) -> dict:
        return training_tensors(self.policy, self.optimizer, self.average)

    def numbers(self) -> list[torch.Tensor]:
        """Everything the next step depends on."""
        found = [p.detach().clone() for p in self.policy.parameters]
        for parameter in self.policy.parameters:
            found += [value.clone() for value in self.optimizer.state[parameter].values()]
        rate = self.optimizer.param_groups[0]["lr"]
        return [*found, self.average["average.0"].clone(), torch.tensor(rate, dtype=torch.double)]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("stop", [0, 2])
def test_goes_on_bit_for_bit(tmp_path: Path, full: bool, stop: int) -> None:
    straight = Training(full)
    for number in range(1, 5):
        straight.step(number)

    first = Training(full)
    for number in range(1, stop + 1):
        first.step(number)
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    state = {"sampler": [3, 1, 2], "loss": 0.1 + 0.2, "schedule": first.schedule.state_dict()}
    path = Checkpoints(tmp_path, 2, ALONE).save(
        stop, first.tensors(), state, {"rng": generator.get_state(), "python": (3, (1, 2))}, RECIPE
    )
    assert path == tmp_path / "checkpoints" / f"step_{stop:06d}"
    first.step(stop + 1)  # saving changes nothing for the run that continues
    for number in range(stop + 2, 5):
        first.step(number)
    assert same(first.numbers(), straight.numbers())

    second = Training(full)
    loaded = Checkpoints(tmp_path, 2, ALONE).newest(RECIPE)
    assert loaded.step == stop and loaded.trainer_state == json.loads(json.dumps(state))
    assert loaded.rank_states[0]["python"] == (3, (1, 2))
    generator_two = torch.Generator()
    generator_two.set_state(loaded.rank_states[0]["rng"])
    assert torch.equal(torch.rand(5, generator=generator), torch.rand(5, generator=generator_two))
    tensors = second.tensors()
    loaded.load_tensors(tensors)
    restore_training(second.policy, second.optimizer, tensors)
    second.schedule.load_state_dict(loaded.trainer_state["schedule"])
    for number in range(stop + 1, 5):
        second.step(number)
    assert same(second.numbers(), straight.numbers())


def save(run: Path, step: int, keep: int = 2, recipe: str = RECIPE) -> Path:
    tensors = {"model": {"w": TENSORS["model"]["w"] + step}, "groups": [{"lr": 0.1}]}
    return Checkpoints(run, keep, ALONE).save(step, tensors, {"step": step}, {}, recipe)


def loaded_step(run: Path, recipe: str = RECIPE) -> int:
    """The step of the newest checkpoint, its tensors and state checked to be of that step."""
    loaded = Checkpoints(run, 2, ALONE).newest(recipe)
    tensors = {"model": {"w": torch.zeros(3000)}, "groups": [{"lr": 0.0}]}
    loaded.load_tensors(tensors)
    assert torch.equal(tensors["model"]["w"], TENSORS["model"]["w"] + loaded.step)
    assert tensors["groups"][0]["lr"] == 0.1 and loaded.trainer_state == {"step": loaded.step}
    return loaded.step


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_keeps_the_last_ones_and_removes_leftovers(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 2, ALONE).newest(RECIPE) is None
    for step in (2, 4, 10):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_000004", "step_000010"]
    leftover = tmp_path / "checkpoints" / "step_000012.tmp"  # of a run that was killed
    (leftover / "tensors").mkdir(parents=True)
    assert loaded_step(tmp_path) == 10
    save(tmp_path, 11, keep=1)
    assert names(tmp_path) == ["step_000011"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys, damage) -> None:
    save(tmp_path, 1)
    whole = save(tmp_path, 2)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert {"complete.json", "trainer_state.json", "rank_0.pt", "recipe.yaml"} < {
        f.name for f in files
    }
    kept = shutil.copytree(whole, tmp_path / "kept")
    for name in files:
        shutil.rmtree(whole)
        shutil.copytree(kept, whole)
        assert loaded_step(tmp_path) == 2 and not capsys.readouterr().err
        damage(whole / name)
        assert loaded_step(tmp_path) == 1, name
        said = capsys.readouterr().err
        assert said.startswith(f"checkpoint {whole} is damaged (") and said.count("\n") == 1
        assert name.as_posix() in said or name.name == "complete.json"
    # The same step, taken again, replaces it; a later one that is damaged does not stay.
    assert save(tmp_path, 2) == whole and loaded_step(tmp_path) == 2
    damage(whole / "trainer_state.json")
    save(tmp_path, 1, keep=1)
    assert names(tmp_path) == ["step_000001"]


def test_all_damaged(tmp_path: Path, capsys) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "trainer_state.json")
    with pytest.raises(UserError, match=r"every checkpoint in .*checkpoints is damaged"):
        Checkpoints(tmp_path, 2, ALONE).newest(RECIPE)
    assert (
        capsys.readouterr().err.count("is damaged (trainer_state.json is not what was written)")
        == 2
    )


def test_a_checkpoint_of_version_0_1_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "trainer_state.json").rename(path / "facts.json")
    sums = (path / "complete.json").read_text()
    (path / "complete.json").write_text(sums.replace("trainer_state.json", "facts.json"))
    message = r"step_000001 has no trainer_state.json: it is of version 0.1, .* another output_dir"
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path, 2, ALONE).newest(RECIPE)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["os.fsync", "torch.save", "json.dump", "pathlib.Path.mkdir"])
def test_full_disk(tmp_path: Path, monkeypatch, place: str) -> None:
    """Wherever in a save the disk turns out to be full."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(place, full_disk)
        with pytest.raises(UserError, match=r"step_000002: No space left.* needs about 0.0 MiB"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"] and loaded_step(tmp_path) == 1
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2


def test_full_file_system(tmp_path: Path) -> None:
    """A real one, because torch's writer reports it as something else."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system")
    try:
        save(tmp_path, 1)  # 12 KB of numbers, and what goes with them
        tensors = {"w": torch.zeros(30_000)}
        with pytest.raises(UserError, match=r"step_000002: No space left.* needs about 0.1 MiB"):
            Checkpoints(tmp_path, 2, ALONE).save(2, tensors, {}, {}, RECIPE)
        assert names(tmp_path) == ["step_000001"] and loaded_step(tmp_path) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_mistake_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Checkpoints(tmp_path, 2, ALONE).save(1, TENSORS, {"no json": object()}, {}, RECIPE)
    assert names(tmp_path) == []


@pytest.mark.parametrize("checkpoint_first", [True, False])
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch, capsys, checkpoint_first) -> None:
    """Also where the report, written on the way out, does not fit either."""

    def train(*_: object, **__: object) -> int:
        try:
            if checkpoint_first:
                raise UserError("cannot write the checkpoint")
        finally:
            full_disk()

    monkeypatch.setattr("opsd_train.run.train", train)
    assert cli.main(["demo/opsd"]) == 2
    wanted = "cannot write the checkpoint" if checkpoint_first else "the disk of the run folder is"
    error = capsys.readouterr().err
    assert error.startswith(f"error: {wanted}") and error.count("\n") == 1


def test_recipes_on_resume(tmp_path: Path) -> None:
    def recipe(*overrides: str) -> str:
        return to_yaml(config("model", tmp_path, *overrides))

    save(tmp_path, 1, recipe=recipe())
    free = ["output_dir=moved", "steps=9", "checkpoint.every=1", "collapse.width=2.0"]
    free += ["evaluation.problems=2", "micro_batch_tokens=300", "rollout.batch_tokens=90"]
    assert loaded_step(tmp_path, recipe(*free)) == 1
    for changes, message in (
        (["optim.lr=0.5"], r"optim.lr was 0.01 and is 0.5; set it back, or start a new run with"),
        (["lora.rank=8", "seed=3"], r"seed was 0 and is 3; lora.rank was 4 and is 8; set it back"),
        (["lora=null"], r"lora.rank was 4 and is None"),
        (["steps=9", "optim.schedule=cosine"], r"steps was 3 and is 9; optim.schedule was 'con"),
        (
            ["seed=1", "optim.lr=1.0", "loss.beta=1.0", "rollout.top_k=5", "problems_per_step=2"],
            r"seed was .*problems_per_step was .*rollout.top_k .* and 2 more; set",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Checkpoints(tmp_path, 2, ALONE).newest(recipe(*changes))


def test_the_adapter_inside_is_pefts(tmp_path: Path) -> None:
    training = Training()
    training.step(1)
    path = Checkpoints(tmp_path, 2, ALONE).save(
        1,
        training.tensors(),
        {},
        {},
        RECIPE,
        lambda folder: save_adapter(training.policy, folder, ALONE),
    )
    again = PeftModel.from_pretrained(make_model(), path / "adapter").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        wanted = training.policy.model.eval()(tokens).logits
        assert torch.equal(again(tokens).logits, wanted)
        assert not torch.equal(make_model()(tokens).logits, wanted)


def test_a_model_folder_holds_the_compute_dtype(tmp_path: Path) -> None:
    training = Training(full=True)
    training.step(1)
    training.policy.dtype = torch.bfloat16
    folder = save_weights(training.policy, make_tokenizer(), tmp_path, ALONE)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert (folder / "model.safetensors").stat().st_size < 1.2 * 2 * again.num_parameters()
    for name, value in training.policy.core.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16()), name


def test_a_run_goes_on_after_sigterm(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Dropout makes every loss depend on the random streams; the run stops where nobody planned."""
    monkeypatch.setattr("opsd_train.run.write_report", lambda folder: None)  # takes the time
    changes = ["steps=6", "checkpoint.every=4", "evaluation.problems=2"]
    changes += ["lora={rank: 4, alpha: 8, dropout: 0.3, target_modules: [q_proj, down_proj]}"]
    assert train(config(tiny_folder, tmp_path / "straight", *changes)) == 0

    step = Trainer.step

    def stopped_in_step_3(self: Trainer, number: int):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped_in_step_3)
        patch.setattr("opsd_train.run.peak_memory_mib", lambda _: 90_000.0)
        assert train(config(tiny_folder, tmp_path / "run", *changes)) == 128 + signal.SIGTERM
    assert names(tmp_path / "run") == ["step_000003"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] == 3
    torch.rand(5)  # another process would stand elsewhere
    assert train(config(tiny_folder, tmp_path / "run", *changes), resume=True) == 0

    assert_same_course(tmp_path / "run", tmp_path / "straight")
    assert names(tmp_path / "run") == ["step_000004", "step_000006"]
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "run")
    ]
    for key in ("status", "steps", "before", "teacher", "after", "paired", "divergence_after"):
        assert summaries[0][key] == summaries[1][key], key
    # The peak is that of both processes.
    assert summaries[0]["peak_memory_mib"] < summaries[1]["peak_memory_mib"] == 90_000
