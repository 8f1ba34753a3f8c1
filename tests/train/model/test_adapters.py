"""LoRA adapters: where they are added, where they are refused, and what they leave frozen."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from opsd_train.config.errors import UserError
from opsd_train.model.adapters import add_adapters, frozen_weight_warnings
from opsd_train.model.policy import Policy
from tests.helpers.family_models import FAMILIES, make_family
from tests.helpers.method_cases import LORA
from tests.helpers.tiny import make_model


def refusal(model: nn.Module, targets: list[str] | str) -> str:
    with pytest.raises(UserError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapters(model, replace(LORA, target_modules=targets))
    line = str(caught.value)
    assert line.startswith("lora.target_modules: ") and len(line) < 200 and "\n" not in line
    return line


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["model.embed_tokens"]])
def test_tied_embeddings_cannot_have_an_adapter(targets: list[str]) -> None:
    assert "embed_tokens cannot have an adapter, its weight is also the head's" in refusal(
        make_model(tied=True), targets
    )
    adapted = add_adapters(make_model(tied=False), replace(LORA, target_modules=targets))
    assert any("embed_tokens.lora" in name for name, p in adapted.named_parameters())


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "lm_head"), ("gpt_neox_japanese", "embed_out")]
)
def test_the_head_cannot_have_an_adapter_whatever_its_name(
    family: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt_neox_japanese", {})
    model = make_family(family, torch.float32)
    assert f"{head} cannot have an adapter, the loss reads its weight" in refusal(model, [head])


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["q_pro"], "the model has no module 'q_pro'"),
        (["q_proj", "w1"], "the model has no module 'w1'"),
        (["mlp"], "'mlp' is LlamaMLP, not a linear layer; name the layers inside it"),
    ],
)
def test_targets_that_match_nothing_or_no_layer(targets: list[str], reason: str) -> None:
    assert reason in refusal(make_model(), targets)


def test_mamba_names_the_layer_that_its_kernels_read() -> None:
    assert "'out_proj' is incompatible" in refusal(
        make_family("mamba", torch.float32), "all-linear"
    )


def adapted_names(model: nn.Module) -> set[str]:
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    return {name.split(".lora_A")[0].removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_linear_layer_but_the_head(tied: bool) -> None:
    model = make_model(tied=tied)
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapted = add_adapters(model, replace(LORA, target_modules="all-linear"))
    assert adapted_names(adapted) == linear - {"lm_head"} and len(linear) == 15


def test_names_may_be_longer() -> None:
    targets = ["layers.1.self_attn.q_proj", "mlp.down_proj"]
    adapted = add_adapters(make_model(), replace(LORA, target_modules=targets))
    assert adapted_names(adapted) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }


@pytest.mark.parametrize(
    ("family", "targets", "lines"),
    [
        ("llama", ["q_proj"], []),
        ("qwen3_moe", ["q_proj"], ["their 18,432 weights stay frozen"]),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], []),
        ("qwen3_moe", "all-linear", []),
        ("gpt_oss", "all-linear", ["their 36,864 weights stay frozen"]),
        (
            "deepseek_v3",
            ["q_a_proj", "gate_proj", "up_proj", "down_proj"],
            [
                f"peft applies {name} to the experts only: 2 linear layers of that name"
                for name in ("gate_proj", "up_proj", "down_proj")
            ],
        ),
    ],
)
def test_weights_that_stay_frozen_are_reported(
    family: str, targets: list[str] | str, lines: list[str]
) -> None:
    lora = replace(LORA, target_modules=targets)
    found = frozen_weight_warnings(add_adapters(make_family(family, torch.float32), lora), lora)
    assert len(found) == len(lines)
    for line, part in zip(found, lines, strict=True):
        assert line.startswith("lora.target_modules: ") and part in line and len(line) < 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_on_experts_train_and_switch_off(dtype: torch.dtype) -> None:
    base = make_family("qwen3_moe", dtype)
    prompts, completions = [[5, 9, 33], [8, 17]], [[12, 99], [7, 66, 23]]

    def hidden(policy: Policy) -> torch.Tensor:
        return policy.run(prompts, completions, lambda hidden, *_: hidden)

    wanted = hidden(Policy(base, 0, dtype)).detach()
    policy = Policy(add_adapters(base, replace(LORA, target_modules="all-linear")), 0, dtype)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    hidden(policy).float().square().sum().backward()
    experts = [p for n, p in policy.model.named_parameters() if "experts" in n and "lora_" in n]
    assert experts and all(p.grad is not None and p.grad.any() for p in experts)
    assert all(p.dtype == torch.float32 for p in policy.parameters)
    assert not torch.equal(hidden(policy), wanted)
    with policy.without_adapters():
        assert torch.equal(hidden(policy), wanted)
