"""A GPU that has too little memory: one line with what needs less, in each phase."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from opsd_train import cache_teacher, cli, run
from opsd_train.evaluation.heldout import HeldOut
from opsd_train.methods.opsd import Opsd
from opsd_train.reporting.out_of_memory import training_advice
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.run import TrainingRun
from opsd_train.trainer import Trainer
from tests.helpers import tiny
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
END = (
    "shard the weights over more processes (torchrun); --dry-run predicts each phase's peak for "
    "models like Llama\n"
)
SAMPLES, PASSES = "lower rollout.batch_tokens (400) or ", "lower micro_batch_tokens (200) or "
SERVED = ("rollout.engine=vllm-server", "rollout.servers=[http://a:1]")
CHECKPOINTING, ADAPTERS = "set model.gradient_checkpointing=true or ", "train adapters (lora) or "


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
        ((Trainer, "_teacher_configs"), ADAPTERS),
        ((HeldOut, "evaluate"), SAMPLES + PASSES),
        ((TransformersEngine, "generate"), SAMPLES),
        ((Opsd, "precompute"), PASSES),
        ((Opsd, "loss"), PASSES + CHECKPOINTING),
        ((Trainer, "_update"), ADAPTERS),
        ((TrainingRun, "save_checkpoint"), ""),
    ],
    ids=["load", "evaluate", "rollout", "teacher", "student", "optimizer", "between"],
)
def test_a_run_names_what_needs_less(where, advice: str, written, monkeypatch, capsys) -> None:
    monkeypatch.setattr(*where, full)
    problems = 2 if where[0] is HeldOut else 0
    assert cli.main([written, f"evaluation.problems={problems}", "lora=null", "steps=1"]) == 2
    assert capsys.readouterr().err == SAID + advice + END


@pytest.mark.parametrize(
    ("overrides", "phase", "advice"),
    [
        ((), "load", ""),
        (("model.gradient_checkpointing=true",), "student", PASSES),
        (("rollout.engine=vllm",), "rollout", "lower rollout.vllm_memory (0.3) or "),
        (SERVED, "rollout", ""),
        (SERVED, "evaluate", PASSES),
    ],
)
def test_what_a_recipe_has_or_has_not_is_not_advised(overrides, phase, advice: str) -> None:
    assert training_advice(tiny.config("m", "r", *overrides), phase) + "\n" == advice + END


def test_an_evaluation(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(TransformersEngine, "generate", full)
    options = ["--set", "chain_sum", "--recipe", "demo/eval", f"output_dir={tmp_path / 'eval'}"]
    overrides = ["sampling.batch_tokens=5000", "task_problems=2", "model.device=cpu"]
    assert cli.main(["eval", str(tiny_folder), *options, *overrides]) == 2
    advice = "lower sampling.batch_tokens (5000) or take a smaller model\n"
    assert capsys.readouterr().err == SAID + advice


def test_a_cache(written, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cache_teacher, "write_caches", full)
    distill = [f"distill.teacher={tiny_folder}", f"distill.cache={tmp_path / 'cache'}"]
    distill += ["method=distill", "distill.on_policy=false", "evaluation.divergence=false"]
    options = [*distill, "loss.objective=top_k"]
    assert cli.main(["cache-teacher", written, *options]) == 2
    assert capsys.readouterr().err == SAID + PASSES + "take a smaller teacher\n"
