"""Layers that store less: transformers' own values bit for bit, right gradients, fewer bytes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from opsd_train.model.recompute import RmsNorm, recompute_activations
from tests.helpers.tiny import make_model

NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)
IDS = torch.arange(24).view(2, 12)


def gradients(model: nn.Module) -> Iterator[Tensor]:
    logits = model(IDS).logits
    logits.float().square().mean().backward()
    yield logits
    yield from (p.grad for p in model.parameters() if p.requires_grad)


def kept_bytes(model: nn.Module) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(IDS)
    return sum(s.nbytes() for address, s in kept.items() if address not in parameters)


def changed(model: nn.Module, checkpointed: bool = False) -> nn.Module:
    recompute_activations(model, checkpointed)
    return model


def mlps(model: nn.Module) -> nn.Module:
    """The model with its norms as they were."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            del module.forward
    return model


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlps_have_the_same_bits(dtype: torch.dtype, checkpointed: bool) -> None:
    plain, lean = make_model(dtype=dtype), make_model(dtype=dtype)
    mlps(changed(lean, checkpointed))
    for mine, theirs in zip(gradients(lean), gradients(plain), strict=True):
        assert torch.equal(mine, theirs) and theirs.count_nonzero() > 0


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_have_the_same_values_and_the_gradients_of_float64(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    norm = kind(48, eps=1e-3).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = (torch.randn(3, 5, 2, 48) * torch.logspace(-2, 1, 5)[:, None, None]).to(dtype)
    grad = torch.randn(3, 5, 2, 48).to(dtype)

    wide = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    (wide[1] * wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-3).sqrt()).backward(
        grad.double()
    )
    results = []
    for function in (norm, lambda x: RmsNorm.apply(x, norm.weight, 1e-3)):
        leaf = x.clone().requires_grad_()
        norm.weight.grad = None
        out = function(leaf)
        out.backward(grad)
        results.append((out, leaf.grad, norm.weight.grad))
    (values, *theirs), (same, *ours) = results
    assert torch.equal(same, values)
    for mine, their, right in zip(ours, theirs, (wide[0].grad, wide[1].grad), strict=True):
        assert mine.dtype == dtype and error(mine, right) <= 1.1 * error(their, right) + 1e-7


def error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


def test_a_frozen_weight_gets_no_gradient_and_the_input_has_its_own() -> None:
    plain, lean = make_model(), changed(make_model())
    for model in (plain, lean):
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_()
    (logits, mine), (_, theirs) = ([*gradients(model)] for model in (lean, plain))
    assert logits.requires_grad and theirs.count_nonzero() > 0
    assert error(mine, theirs.double()) < 1e-5


@pytest.mark.parametrize(("dtype", "norm_bytes"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_what_each_layer_stores_no_more(dtype: torch.dtype, norm_bytes: int) -> None:
    """Two activations of an MLP: silu(gate) and the product; of a norm float32 and the value
    before the weight."""
    plain, lean = make_model(dtype=dtype), changed(make_model(dtype=dtype))
    config, tokens = plain.config, IDS.numel()
    layer = 2 * tokens * config.intermediate_size * dtype.itemsize
    norm = tokens * config.hidden_size * (norm_bytes + dtype.itemsize)
    layers = config.num_hidden_layers
    saved = kept_bytes(plain) - kept_bytes(lean)
    assert saved == layers * layer + (2 * layers + 1) * norm


@pytest.mark.parametrize("kind", ["gelu", "another model"])
def test_other_mlps_stay(kind: str) -> None:
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    if kind == "gelu":
        model = LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **sizes, num_attention_heads=2))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, head_dim=8))
    recompute_activations(model, checkpointed=False)
    assert "forward" not in vars(model.model.layers[0].mlp)
