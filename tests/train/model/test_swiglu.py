"""The memory-saving SwiGLU: transformers' own results bit for bit, and fewer saved bytes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from opsd_train.model.swiglu import recompute_silu
from tests.helpers.tiny import make_model

IDS = torch.arange(24).view(2, 12)


def gradients(model: nn.Module) -> Iterator[Tensor]:
    logits = model(IDS).logits
    logits.float().square().mean().backward()
    yield logits
    yield from (p.grad for p in model.parameters())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits(dtype: torch.dtype) -> None:
    plain, lean = make_model(dtype=dtype), make_model(dtype=dtype)
    recompute_silu(lean)
    for mine, theirs in zip(gradients(lean), gradients(plain), strict=True):
        assert torch.equal(mine, theirs) and theirs.count_nonzero() > 0


def test_one_activation_less_in_each_layer() -> None:
    plain, lean = make_model(), make_model()
    recompute_silu(lean)
    config = plain.config
    activation = IDS.numel() * config.intermediate_size * 4
    assert kept_bytes(plain) - kept_bytes(lean) == config.num_hidden_layers * activation


@pytest.mark.parametrize("kind", ["gelu", "another model"])
def test_other_mlps_stay(kind: str) -> None:
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    if kind == "gelu":
        model = LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **sizes, num_attention_heads=2))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, head_dim=8))
    recompute_silu(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
