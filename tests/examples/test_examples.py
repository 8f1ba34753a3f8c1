"""The examples run as their docstrings say, and print what full logits give in fp64."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from opsd_kernels import reference
from opsd_kernels.testing import assert_close, make_pair

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

Steps = list[tuple[float, float]]  # loss and gradient norm of each step


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *options: str, launcher: list[str] | None = None, cwd: Path = ROOT) -> str:
    """What the example prints, on CPUs with one thread."""
    command = [sys.executable, *(launcher or []), str(ROOT / f"examples/{name}.py"), *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | here
    made = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def printed_steps(text: str) -> Steps:
    found = re.findall(r"^step \d+: loss (\S+), gradient norm (\S+)$", text, re.MULTILINE)
    return [(float(loss), float(norm)) for loss, norm in found]


def logged_steps(text: str) -> Steps:
    found = re.findall(r"'loss': '?([^',]+)'?, 'grad_norm': '?([^',]+)", text)
    return [(float(loss), float(norm)) for loss, norm in found]


def true_steps(
    model: nn.Module, loss_of: Callable[[], Tensor], steps: int, weight_decay: float = 0.01
) -> Steps:
    """AdamW with gradients clipped at norm 1, by plain autograd."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=weight_decay)
    seen = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
    return seen


def assert_steps(actual: Steps, truth: Steps, rel: float = 2e-4) -> None:
    """A gradient of the wrong size has another norm, one of another direction another next loss."""
    assert len(actual) == len(truth)
    for number, (mine, true) in enumerate(zip(actual, truth, strict=True)):
        assert mine == pytest.approx(true, rel=rel, abs=2e-7), f"step {number}"


def full_log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double().log_softmax(-1)


def llama(config: dict) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.2))


def seeded_llama(config: dict) -> LlamaForCausalLM:
    """The model of the examples, which seed with 0."""
    torch.manual_seed(0)
    return llama(config)


def true_self_distillation(model: nn.Module, rows: list[list[list[int]]]) -> Tensor:
    losses = []
    for question, solution, completion in rows:
        last = slice(-len(completion) - 1, -1)
        student = full_log_probs(model, torch.tensor([question + completion]))[0, last]
        with torch.no_grad():
            seen = torch.tensor([question + solution + completion])
            teacher = full_log_probs(model, seen)[0, last]
        losses.append(reference.jsd(student, teacher, 0.5))
    return torch.cat(losses).mean()


def true_divergence(student: nn.Module, teacher: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean JSD at the positions that predict a label."""
    with torch.no_grad():
        log_t = full_log_probs(teacher, ids)
    values = reference.jsd(full_log_probs(student, ids), log_t, 0.5)
    return values[:, :-1][labels[:, 1:] != -100].mean()


def assert_gradients(model: nn.Module, true_model: nn.Module) -> None:
    for (name, mine), true in zip(model.named_parameters(), true_model.parameters(), strict=True):
        assert_close(mine.grad, true.grad, floor=2e-5, name=name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_open_with_their_commands(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    docstring = text.split('"""')[1]
    assert re.search(rf"CPU.*:  +\S.*examples/{path.name}", docstring)


def test_there_are_six_examples() -> None:
    names = {path.stem for path in EXAMPLES}
    others = {"fsdp2", "losses", "own_divergence", "training_loop"}
    assert names == others | {"transformers_trainer", "trl_sdft"}


def test_losses_prints_equal_values_and_gradients() -> None:
    text = run("losses")
    pattern = r"^(.+): fused (\S+), plain (\S+), gradient difference (\S+)$"
    found = re.findall(pattern, text, re.MULTILINE)
    assert [name for name, *_ in found] == list(load("losses").LOSSES)
    for name, fused, plain, difference in found:
        assert float(fused) == pytest.approx(float(plain), rel=1e-5), name
        assert float(fused) > 0.1, name
        assert float(difference) < 1e-4, name
    assert "logits of both models in fp32: 32 MiB" in text
    assert "workspace 4 MiB" in text


@pytest.mark.parametrize("name", ["JSD", "reverse KL", "cross-entropy"])
def test_losses_are_the_divergences_they_are_called(name: str) -> None:
    fused, plain = load("losses").LOSSES[name]
    h_s, w_s, h_t, w_t, y, *_ = make_pair(12, 16, 301).values()
    student = [h_s.requires_grad_(), w_s.requires_grad_()]
    log_s, log_t = (h_s @ w_s.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1)
    truth = {
        "JSD": lambda: reference.jsd(log_s, log_t, 0.5),
        "reverse KL": lambda: reference.reverse_kl(log_s, log_t),
        "cross-entropy": lambda: reference.cross_entropy(log_s, y),
    }[name]().mean()
    grads = torch.autograd.grad(truth, student, retain_graph=True)
    for made in (fused(h_s, w_s, h_t, w_t, y), plain(log_s, log_t, y)):
        assert_close(made, truth, name="loss")
        made_grads = torch.autograd.grad(made, student, retain_graph=True)
        for mine, true in zip(made_grads, grads, strict=True):
            assert_close(mine, true, name="gradient")


def test_training_loop_prints_the_steps_of_full_logits() -> None:
    module = load("training_loop")
    model = seeded_llama(module.TINY).double()
    rows = [[list(text.encode()) for text in row] for row in module.ROWS]
    truth = true_steps(model, lambda: true_self_distillation(model, rows), 5)
    assert_steps(printed_steps(run("training_loop")), truth)


def test_training_loop_gradients() -> None:
    module = load("training_loop")
    rows = [[[1, 2], [3, 4, 5], [6, 7, 8]], [[9], [10], [11]]]
    model, true_model = seeded_llama(module.TINY), seeded_llama(module.TINY).double()
    module.self_distillation(model, rows).backward()
    true_self_distillation(true_model, rows).backward()
    assert_gradients(model, true_model)


TRAINER_OPTIONS = [
    "--learning_rate=1e-3",
    "--lr_scheduler_type=constant",
    "--disable_tqdm=true",
    "--use_cpu=true",
]


def true_trainer_steps() -> Steps:
    """Steps over all of the example's 16 rows at once."""
    config = load("transformers_trainer").TINY
    student, teacher = seeded_llama(config), llama(config)
    ids = torch.randint(256, (16, 24))
    labels = torch.where(torch.arange(24) < torch.randint(4, 20, (16, 1)), -100, ids)
    student, teacher = student.double(), teacher.double()
    loss_of = partial(true_divergence, student, teacher, ids, labels)
    return true_steps(student, loss_of, 3, weight_decay=0.0)


@pytest.mark.parametrize(
    "ranks",
    [1, pytest.param(2, marks=[pytest.mark.dist, pytest.mark.slow])],
    ids=lambda n: f"{n}-ranks",
)
def test_trainer_steps_are_those_of_the_whole_batch(ranks: int, tmp_path: Path) -> None:
    """Micro-batches have 4 rows with different numbers of labels, 16 rows make a step."""
    split = ["--per_device_train_batch_size=4", f"--gradient_accumulation_steps={4 // ranks}"]
    launcher = TORCHRUN if ranks == 2 else None
    text = run("transformers_trainer", *TRAINER_OPTIONS, *split, launcher=launcher, cwd=tmp_path)
    assert_steps(logged_steps(text), true_trainer_steps(), rel=1e-3)


@pytest.mark.parametrize("counted", [True, False])
def test_trainer_gradients_and_evaluation(counted: bool, tmp_path: Path) -> None:
    module = load("transformers_trainer")
    student, teacher = seeded_llama(module.TINY), llama(module.TINY)
    ids = torch.randint(256, (3, 11))
    labels = torch.where(torch.arange(11) < torch.tensor([[2], [5], [9]]), -100, ids)
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True)
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    trainer = module.DistillationTrainer(student, args, eval_dataset=data)
    trainer.teacher = teacher
    true_student, true_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()

    num_items = 2 * (labels != -100).sum() if counted else None
    inputs = {"input_ids": ids, "labels": labels}
    trainer.compute_loss(student, inputs, num_items_in_batch=num_items).backward()
    truth = true_divergence(true_student, true_teacher, ids, labels)
    (truth / 2 if counted else truth).backward()
    assert_gradients(student, true_student)

    assert trainer.evaluate()["eval_loss"] == pytest.approx(truth.item(), rel=1e-5)
    assert student(input_ids=ids).logits.shape == (3, 11, 256)  # its own forward is back


@pytest.mark.dist
def test_fsdp2_steps_are_those_of_one_process() -> None:
    module = load("fsdp2")
    model = seeded_llama(module.TINY)
    ids = torch.randint(261, (8, 24))
    model.double()

    def loss() -> Tensor:
        with torch.no_grad():
            log_t = full_log_probs(model, ids)[:, -7:-1]
        log_s = full_log_probs(model, ids[:, 8:])[:, -7:-1]
        return reference.jsd(log_s, log_t, 0.5).mean()

    assert_steps(printed_steps(run("fsdp2", launcher=TORCHRUN)), true_steps(model, loss, 4))


def test_own_divergence_prints_errors_like_those_of_plain_pytorch() -> None:
    found = re.findall(r"largest error (\S+), of plain PyTorch (\S+)", run("own_divergence"))
    assert len(found) == 6
    for ours, theirs in found:
        assert 0 < float(ours) < 2 * float(theirs) + 1e-6


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0])
def test_own_divergence_is_renyis(alpha: float) -> None:
    """Written as its definition says; hidden sizes differ and the teacher may need gradients."""
    pair = make_pair(12, 16, 301, teacher_hidden=20, masked=3)
    h_s, w_s, h_t, w_t, y, *_ = pair.values()
    heads = [x.requires_grad_() for x in (h_s, w_s, h_t, w_t)]
    s, t = (h_s @ w_s.T).softmax(-1), (h_t @ w_t.T).softmax(-1).detach()
    sums = (s**alpha * t ** (1 - alpha)).sum(-1)
    truth = (sums.log() / (alpha - 1))[y != -100].mean()
    made = load("own_divergence").fused_renyi(*heads, y, alpha)
    assert_close(made, truth, name="loss")
    grads = torch.autograd.grad(truth, heads[:2])
    mine = torch.autograd.grad(made, heads, allow_unused=True)
    assert mine[2] is None and mine[3] is None
    for name, actual, true in zip(("hidden", "weight"), mine[:2], grads, strict=True):
        assert_close(actual, true, name=name)


def test_own_divergence_tends_to_the_reverse_kl() -> None:
    h_s, w_s, h_t, w_t, y, *_ = make_pair(12, 16, 301).values()
    near = load("own_divergence").fused_renyi(h_s, w_s, h_t, w_t, y, 1 + 1e-6)
    log_s, log_t = (h_s @ w_s.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1)
    limit = reference.reverse_kl(log_s, log_t).mean()
    assert near.item() == pytest.approx(limit.item(), rel=1e-4)


def test_trl_sdft_steps_are_those_of_trls_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--use_cpu", "true", "--disable_tqdm", "true", "--output_dir", str(tmp_path)]
    ours = logged_steps(run("trl_sdft", *options, cwd=tmp_path))
    module = load("trl_sdft")
    monkeypatch.setattr(module, "fused", lambda trainer: trainer)
    monkeypatch.setattr(sys, "argv", ["trl_sdft.py", *options])
    module.main()
    assert_steps(ours, logged_steps(capsys.readouterr().out))
    assert len(ours) == 3
