"""Whole runs on a tiny random model: their files, errors and exit codes, also when interrupted."""

import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from opsd_train import cli
from opsd_train.config.errors import UserError
from opsd_train.data.seeds import stable_seed
from opsd_train.distributed.context import DistributedContext, resolve_device
from opsd_train.methods.opsd import Opsd
from opsd_train.model.policy import check_vocabulary
from opsd_train.reporting.run_folder import RunFolder, claim, release
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.run import train
from opsd_train.trainer import Trainer
from tests.helpers import devices
from tests.helpers.tiny import config, make_model, make_tokenizer, recipe
from tests.helpers.verdicts import children, wait_until_gone

ROOT = Path(__file__).parents[2]


def make_trainer(*arguments) -> Trainer:
    made, context = config(*arguments), DistributedContext(torch.device(devices.NAME))
    return Trainer(made, context, RunFolder(Path(made.output_dir), context), PhaseTimer(), "full")


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def status(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["status"]


@pytest.mark.parametrize("lora", [(), ("lora=null",)], ids=["lora", "all weights"])
@pytest.mark.parametrize("method", ["opsd", "distill"])
def test_models_are_on_the_device_of_the_recipe(
    tiny_folder: Path, tmp_path: Path, method: str, lora: tuple[str, ...]
) -> None:
    other = [f"distill.teacher={tiny_folder}"] if method == "distill" else []
    trainer = make_trainer(tiny_folder, tmp_path / "run", f"method={method}", *other, *lora)
    policies = [trainer.policy]
    if other:
        policies += [teacher.policy for teacher in trainer.method.teachers.values()]
    kept = [*trainer.method.state().values()]
    for policy in policies:
        kept += [*policy.model.parameters(), *policy.model.buffers()]
    assert {tensor.device.type for tensor in kept} == {devices.NAME}
    trainer.close()


@pytest.mark.parametrize("objective", ["full_vocabulary", "sampled_token"])
def test_run_folder(tiny_folder: Path, tmp_path: Path, objective: str) -> None:
    assert train(config(tiny_folder, tmp_path / "run", f"loss.objective={objective}")) == 0
    run = tmp_path / "run"
    metrics = rows(run)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    wanted = {"loss", "divergence", "accuracy", "completion_length", "grad_norm", "lr", "tokens"}
    assert wanted <= metrics[0].keys() and metrics[0]["grad_norm"] > 0
    assert ("student_entropy" in metrics[0]) == (objective == "full_vocabulary")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 3
    assert summary["before"]["problems"] == summary["after"]["problems"] == 6
    assert summary["paired"]["difference"] == pytest.approx(
        summary["after"]["accuracy"] - summary["before"]["accuracy"]
    )
    assert summary["tokens"] == metrics[-1]["tokens"] and summary["peak_memory_mib"] > 0
    assert {row["step"] for row in rows(run, "samples.jsonl")} == {1, 2}
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert "<html" in (run / "report.html").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 3


@pytest.mark.parametrize("budget", [200, 10_000])
def test_the_loss_is_the_mean_over_the_steps_tokens(
    tiny_folder: Path, tmp_path: Path, budget: int
) -> None:
    """However the step is cut: the statistics of its tokens are averaged by other code."""
    run = tmp_path / "run"
    changes = ["loss.beta=0.5", f"micro_batch_tokens={budget}", "evaluation.problems=0"]
    train(config(tiny_folder, run, *changes))
    for row in rows(run):
        assert row["loss_tokens"] > 8
        assert row["loss"] == pytest.approx(row["divergence"], rel=1e-4)


def test_training_moves_the_adapter_and_not_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    run = make_trainer(tiny_folder, tmp_path / "run")
    model = run.policy.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in (1, 2):
        run.step(step)
    for name, value in model.state_dict().items():
        if "lora_B" in name:
            assert not torch.equal(value, before[name]), name
        elif "lora_" not in name:
            assert torch.equal(value, before[name]), name


def test_the_divergence_falls(tiny_folder: Path, tmp_path: Path) -> None:
    changes = ["steps=30", "optim.lr=2e-2", "loss.beta=0.5", "evaluation.problems=6"]
    train(config(tiny_folder, tmp_path / "run", *changes))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["divergence_after"] < 0.7 * summary["divergence_before"]


def test_two_runs_are_bit_identical(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(config(tiny_folder, tmp_path / name))
    one, two = (
        [(r["loss"], r["grad_norm"], r["tokens"]) for r in rows(tmp_path / name)] for name in "ab"
    )
    assert one == two


def test_four_frames_lead_to_a_step(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """From the command line to the step: short enough to follow by reading."""

    def step(self: Trainer, number: int):
        names = [frame.name for frame in traceback.extract_stack()]
        raise UserError(" < ".join(reversed(names[names.index("main") :])))

    monkeypatch.setattr(Trainer, "step", step)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_folder, tmp_path / "run")))
    assert cli.main([str(path), "evaluation.problems=0"]) == 2
    assert "error: step < fit < train < _train < main\n" in capsys.readouterr().err


def test_a_second_run_overwrites_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        train(config(tiny_folder, tmp_path / "run", "steps=1", "evaluation.problems=0"))
    assert len(rows(tmp_path / "run")) == len(rows(tmp_path / "run-2")) == 1


def test_runs_that_start_together_take_different_folders(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "sweep"
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(claim, [wanted] * 8))
    names = {"sweep", *(f"sweep-{n}" for n in range(2, 9))}
    assert {folder.name for folder in taken} == names
    assert {folder.name for folder in wanted.parent.iterdir()} == names


def test_a_folder_of_something_else_is_taken_and_given_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert claim(tmp_path / "run") == tmp_path / "run"
    release(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_run_that_cannot_start_leaves_no_folder(tiny_folder: Path, tmp_path: Path) -> None:
    settings = config(tiny_folder, tmp_path / "run", "rollout.max_new_tokens=100000")
    with pytest.raises(UserError):
        train(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "eval", "export"])
def test_a_folder_that_cannot_be_made(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    (tmp_path / "file").touch()
    inside, recipe_file = tmp_path / "file" / "run", tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(recipe(tiny_folder, inside)))
    asked = {
        "train": [str(recipe_file)],
        "eval": ["eval", str(tiny_folder), "--set", "chain_sum", "--recipe", "demo/eval"],
        "export": ["export", str(inside), str(inside)],
    }[command]
    if command == "eval":
        asked += [f"output_dir={inside}", "problems=1", "sampling.max_new_tokens=2"]
    assert cli.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert len(line) < 200 and str(tmp_path / "file") in line and line.startswith("error: ")


@pytest.mark.parametrize("name", ["mps", "cuda:7", "banana", "meta", "xpu"])
def test_a_device_that_is_not_there(name: str) -> None:
    if (name == "xpu" and torch.xpu.is_available()) or (name == "mps" and torch.mps.is_available()):
        pytest.skip("this machine has one")
    with pytest.raises(
        UserError, match=rf"model.device={name} is not available; PyTorch has .* here"
    ):
        resolve_device(name)


def test_interrupted_between_steps(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    original = Trainer.step

    def step(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(Trainer, "step", step)
    assert train(config(tiny_folder, tmp_path / "run", "steps=9")) == 130
    run = tmp_path / "run"
    assert len(rows(run)) == 2
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] == 2
    assert "interrupted" in (run / "report.html").read_text()


@devices.starts_a_process
def test_interrupted_by_ctrl_c(tiny_folder: Path, tmp_path: Path) -> None:
    path, run = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe(tiny_folder, run)))
    command = [sys.executable, "-m", "opsd_train", str(path), "steps=100000"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run started in the background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and rows(run)):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.1)
        grading = children(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert (run / "report.html").stat().st_size > 0
    assert len(grading) == 1
    wait_until_gone(*grading)


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_not_finite_keeps_the_batch(tiny_folder, tmp_path, monkeypatch, capsys, place) -> None:
    original = Opsd.loss

    def loss(*arguments):
        value, stats = original(*arguments)
        # The square root's slope is infinite where the loss itself is 0.
        return (value * torch.nan if place == "loss" else (value - value.detach()).sqrt()), stats

    monkeypatch.setattr(Opsd, "loss", loss)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_folder, tmp_path / "run")))
    assert cli.main([str(path), "evaluation.problems=0"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step 1:") and "nonfinite_step_1.pt" in error
    batch = torch.load(tmp_path / "run" / "nonfinite_step_1.pt")
    assert batch and batch[0].keys() >= {"problem", "student_prompt", "completion"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name_or_path=/no/such/model", "model.name_or_path=/no/such/model"),
        ("model.device=cuda:7", "model.device=cuda:7 is not available"),
        ("lora.target_modules=[q_proj,lm_head]", "lm_head cannot have an adapter"),
        ("lora.target_modules=[q_pro]", "the model has no module 'q_pro'"),
        ("rollout.max_new_tokens=2000", "more than the model's context of 2048"),
        ("rollout.stop_tokens=[no such]", "rollout.stop_tokens: 'no such' is not one token"),
        ("rollout.engine=vllm", "make vllm"),
        ("report.trackers=[trackio]", "pip install trackio"),
        ("method=sft", "prompts.max_solution_tokens=1"),
        (
            "prompts.max_prompt_tokens=3",
            "20 of 20 problems are longer than prompts.max_prompt_tokens=3",
        ),
        ("data.train_size=500", "distinct problems"),
        ("micro_batch_tokens=10", "micro_batch_tokens=10"),
    ],
)
def test_bad_input_is_one_line(tiny_folder, tmp_path, capsys, override: str, message: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_folder, tmp_path / "run")))
    assert cli.main([str(path), override, "prompts.max_solution_tokens=1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run" / "config.yaml").exists() or "failed" in status(tmp_path / "run")


def test_without_a_chat_template(tiny_folder, tmp_path, capsys) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, tmp_path / "run")))
    assert cli.main([str(path)]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_no_problem_left(tiny_folder, tmp_path, capsys) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_folder, tmp_path / "run")))
    assert cli.main([str(path), "prompts.max_prompt_tokens=3", "prompts.overlong=skip"]) == 2
    assert "none is left" in capsys.readouterr().err


def test_vocabulary_smaller_than_the_tokenizers() -> None:
    check_vocabulary(make_model(), make_tokenizer())
    with pytest.raises(UserError, match=r"\(100 entries\) is smaller than the tokenizer's \(261\)"):
        check_vocabulary(make_model(vocab_size=100), make_tokenizer())


def test_seeds_do_not_depend_on_the_process() -> None:
    assert stable_seed(0, "rollout", 1) == 3460020679
    assert stable_seed(0, "rollout", 2) != stable_seed(0, "rollout", 1)
