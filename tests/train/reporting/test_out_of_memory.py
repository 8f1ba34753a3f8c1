"""A GPU that has too little memory: one line that names the key to lower, in each phase."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from opsd_train import cache_teacher, cli, run
from opsd_train.evaluation.heldout import HeldOut
from opsd_train.methods.opsd import Opsd
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.trainer import Trainer
from tests.helpers.tiny import recipe

# As PyTorch says it.
MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 3.20 GiB is free. Including non-PyTorch memory, this process has 75.90 GiB memory in "
    "use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 5.00 GiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
SAID = (
    "error: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of "
    "79.11 GiB of which 3.20 GiB is free; "
)
END = "; --dry-run predicts the peak of each phase\n"
PASSES = "lower micro_batch_tokens (200)"
WEIGHTS = "train adapters (lora) or shard the weights over more processes (torchrun)"


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(MESSAGE)


@pytest.fixture
def written(tiny_folder: Path, tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setattr(run, "write_report", lambda folder: None)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_folder, tmp_path / "run")))
    return str(path)


@pytest.mark.parametrize(
    ("where", "advice"),
    [
        ((Trainer, "_teacher_configs"), WEIGHTS),
        ((HeldOut, "evaluate"), "lower rollout.batch_tokens (400) or micro_batch_tokens (200)"),
        ((TransformersEngine, "generate"), "lower rollout.batch_tokens (400)"),
        ((Opsd, "precompute"), PASSES),
        ((Opsd, "loss"), PASSES + " or set model.gradient_checkpointing=true"),
        ((Trainer, "_update"), WEIGHTS),
    ],
    ids=["load", "evaluate", "rollout", "teacher", "student", "optimizer"],
)
def test_a_run_names_what_needs_less(where, advice: str, written, monkeypatch, capsys) -> None:
    monkeypatch.setattr(*where, full)
    problems = 2 if where[0] is HeldOut else 0
    assert cli.main([written, f"evaluation.problems={problems}"]) == 2
    assert capsys.readouterr().err == SAID + advice + END


def test_what_a_recipe_has_already_is_not_advised(written, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Opsd, "loss", full)
    changed = ["model.gradient_checkpointing=true", "evaluation.problems=0"]
    assert cli.main([written, *changed]) == 2
    assert capsys.readouterr().err == SAID + PASSES + END


def test_an_evaluation(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(TransformersEngine, "generate", full)
    options = ["--set", "chain_sum", "--recipe", "demo/eval", f"output_dir={tmp_path / 'eval'}"]
    overrides = ["sampling.batch_tokens=5000", "task_problems=2", "model.device=cpu"]
    assert cli.main(["eval", str(tiny_folder), *options, *overrides]) == 2
    assert capsys.readouterr().err == SAID + "lower sampling.batch_tokens (5000)\n"


def test_a_cache(written, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cache_teacher, "write_caches", full)
    distill = [f"distill.teacher={tiny_folder}", f"distill.cache={tmp_path / 'cache'}"]
    distill += ["method=distill", "distill.on_policy=false", "evaluation.divergence=false"]
    options = [*distill, "loss.objective=top_k"]
    assert cli.main(["cache-teacher", written, *options]) == 2
    assert capsys.readouterr().err == SAID + PASSES + "\n"
