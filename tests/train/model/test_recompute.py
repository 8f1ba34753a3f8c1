"""Layers that store less: transformers' own results bit for bit, and fewer saved bytes."""

import gc
import weakref
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

from opsd_train.config.schema import LoraConfig
from opsd_train.model.adapters import add_adapters
from opsd_train.model.policy import Policy
from opsd_train.model.recompute import RmsNorm, recompute_activations
from tests.helpers.saved_bytes import saved_bytes
from tests.helpers.tiny import make_model

NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12)


def gradients(model: nn.Module) -> Iterator[Tensor]:
    logits = model(IDS).logits
    logits.float().square().mean().backward()
    yield logits
    yield from (p.grad for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_same_bits(checkpointed: bool) -> None:
    plain, lean = (make_model(dtype=torch.bfloat16) for _ in range(2))
    recompute_activations(lean, checkpointed)
    for mine, theirs in zip(gradients(lean), gradients(plain), strict=True):
        assert torch.equal(mine, theirs) and theirs.count_nonzero() > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_get_the_same_bits(checkpointed: bool) -> None:
    """Float32 adapters on every linear layer, as the trainer runs them."""
    found = []
    for change in (False, True):
        torch.manual_seed(0)
        model = make_model(dtype=torch.bfloat16)
        if change:
            recompute_activations(model, checkpointed)
        adapted = add_adapters(model, LoraConfig(rank=4, alpha=8, target_modules=LINEAR))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # it starts as 0, and then lora_A has no gradient
                nn.init.normal_(parameter, std=0.1)
        policy = Policy(adapted, 0, torch.bfloat16)
        hidden = policy.run([[1] * 5], [[3] * 7], lambda hidden, *_: hidden)
        hidden.float().square().mean().backward()
        found.append([hidden, *(p.grad for p in policy.parameters)])
    assert len(found[0]) == 1 + 2 * len(LINEAR) * model.config.num_hidden_layers
    for theirs, mine in zip(*found, strict=True):
        assert torch.equal(mine, theirs) and theirs.count_nonzero() > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_in_float32_gradients_add_up_in_another_order(checkpointed: bool) -> None:
    """Those of a norm's input, which the residual stream reads too."""
    plain, lean = make_model(), make_model()
    recompute_activations(lean, checkpointed)
    (logits, *mine), (same, *theirs) = gradients(lean), gradients(plain)
    assert torch.equal(logits, same)
    for found, wanted in zip(mine, theirs, strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("weight", [torch.float32, None], ids=["fp32", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_have_the_same_bits(
    kind: type[nn.Module], weight: torch.dtype | None, dtype: torch.dtype
) -> None:
    norm = kind(48, eps=1e-3).to(weight or dtype)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = (torch.randn(3, 5, 2, 48) * torch.logspace(-2, 1, 5)[:, None, None]).to(dtype)
    grad = torch.randn(3, 5, 2, 48).to(weight or dtype)
    results = []
    for function in (norm, lambda x: RmsNorm.apply(x, norm.weight, 1e-3)):
        leaf, norm.weight.grad = x.clone().requires_grad_(), None
        out = function(leaf)
        out.backward(grad)
        results.append((out, leaf.grad, norm.weight.grad))
    for theirs, mine in zip(*results, strict=True):
        assert torch.equal(mine, theirs) and theirs.count_nonzero() > 0


def test_frozen_norms_pass_the_gradient_on() -> None:
    plain, lean = (make_model(dtype=torch.bfloat16) for _ in range(2))
    recompute_activations(lean, checkpointed=False)
    for model in (plain, lean):
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_()
    (_, mine), (_, theirs) = gradients(lean), gradients(plain)
    assert torch.equal(mine, theirs) and theirs.count_nonzero() > 0


@pytest.mark.parametrize(("dtype", "norm_bytes"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_what_each_layer_stores_no_more(dtype: torch.dtype, norm_bytes: int) -> None:
    """Two activations of an MLP: silu(gate) and the product; of a norm float32, the value before
    the weight, and the result, which only the last one's reader stores."""
    plain, lean = make_model(dtype=dtype), make_model(dtype=dtype)
    recompute_activations(lean, checkpointed=False)
    config, tokens = plain.config, IDS.numel()
    layer = 2 * tokens * config.intermediate_size * dtype.itemsize
    norm = tokens * config.hidden_size * (norm_bytes + dtype.itemsize)
    layers = config.num_hidden_layers
    found = [saved_bytes(model, lambda model=model: model(IDS)) for model in (plain, lean)]
    saved = found[0] - found[1]
    results = 2 * layers * tokens * config.hidden_size * dtype.itemsize
    assert saved == layers * layer + (2 * layers + 1) * norm + results


def test_backward_twice() -> None:
    """What is made again for the first one is made again for the second."""
    plain, lean = (make_model(dtype=torch.bfloat16) for _ in range(2))
    recompute_activations(lean, checkpointed=False)
    found = []
    for model in (plain, lean):
        leaves = list(model.parameters())
        loss = model(IDS).logits.float().square().mean()
        found.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        found.append(torch.autograd.grad(loss, leaves))
    for grads in zip(*found, strict=True):
        assert all(torch.equal(grads[0], grad) for grad in grads) and grads[0].count_nonzero() > 0


def test_the_graph_ends_with_its_loss() -> None:
    """Hooks that hold a tensor of their own graph would keep it until the garbage collector."""
    model = make_model(dtype=torch.bfloat16)
    recompute_activations(model, checkpointed=False)
    gc.disable()
    try:
        logits = model(IDS).logits
        node = weakref.ref(norm_node(logits.grad_fn))
        assert node() is not None
        del logits
        assert node() is None
    finally:
        gc.enable()


def norm_node(node: torch.autograd.graph.Node) -> torch.autograd.graph.Node:
    """The nearest norm before a node."""
    while not isinstance(node, RmsNorm._backward_cls):
        node = next(before for before, _ in node.next_functions if before is not None)
    return node


@pytest.mark.parametrize("kind", ["gelu", "another model"])
def test_other_mlps_stay(kind: str) -> None:
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    if kind == "gelu":
        model = LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **sizes, num_attention_heads=2))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, head_dim=8))
    recompute_activations(model, checkpointed=False)
    assert "forward" not in vars(model.model.layers[0].mlp)
