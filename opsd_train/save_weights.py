"""Weights in the formats of the field: adapters as PEFT's, models as transformers' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsd_train.model import Policy
from opsd_train.parallel import whole
from opsd_train.world import World


def save_adapter(policy: Policy, folder: Path, world: World) -> None:
    """The adapter, as PeftModel.from_pretrained and vLLM read it. Every rank calls it."""
    names = {parameter: name for name, parameter in policy.model.named_parameters()}
    weights = {names[p]: _gathered(p, torch.float32, world) for p in policy.parameters}
    if world.leads:
        policy.model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)


def save_model(policy: Policy, tokenizer: Any, folder: Path, world: World) -> None:
    """The whole model in its compute dtype, with the tokenizer. Every rank calls it."""
    weights: dict[Tensor, Tensor] = {}  # tied ones are gathered once, and stay tied
    named = policy.core.state_dict(keep_vars=True)
    for tensor in named.values():
        if tensor not in weights:
            weights[tensor] = _gathered(tensor, policy.dtype, world)
    if world.leads:
        state = {name: weights[tensor] for name, tensor in named.items()}
        write_model(policy.core, state, policy.dtype, tokenizer, folder)


def write_model(
    model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype, tokenizer: Any, folder: Path
) -> None:
    """A folder from_pretrained reads; `state` is in `dtype`, whatever the model's own is."""
    model.save_pretrained(str(folder), state_dict=state)
    # transformers wrote the type of the weights in memory.
    kept = model.config.dtype
    model.config.dtype = dtype
    model.config.save_pretrained(str(folder))
    model.config.dtype = kept
    tokenizer.save_pretrained(str(folder))


@torch.no_grad()
def _gathered(tensor: Tensor, dtype: torch.dtype, world: World) -> Tensor:
    """On the CPU of rank 0; the others give their shards and keep nothing."""
    full = whole(tensor.detach())
    if not world.leads:
        return torch.empty(0)
    return full.to("cpu", dtype if full.is_floating_point() else None)
