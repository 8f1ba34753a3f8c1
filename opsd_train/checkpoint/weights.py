"""Trained weights as files that other programs read: PEFT's adapter, or a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import full_tensor
from opsd_train.model.adapters import trained_weights, write_adapter
from opsd_train.model.policy import Policy


def save_weights(
    policy: Policy, tokenizer: Any, run_dir: Path, context: DistributedContext
) -> Path:
    """run_dir/adapter where adapters are trained, else run_dir/model. Every rank calls it."""
    if policy.has_adapters:
        folder = run_dir / "adapter"
        save_adapter(policy, folder, context)
        return folder
    folder = run_dir / "model"
    state = _gather(policy.core.state_dict(keep_vars=True), context)
    if context.is_main:
        write_model(policy.core, state, policy.dtype, folder)
        tokenizer.save_pretrained(str(folder))
    return folder


def save_adapter(policy: Policy, folder: Path, context: DistributedContext) -> None:
    """The adapter in PEFT's own format. Every rank calls it."""
    state = _gather(trained_weights(policy.model), context)
    if context.is_main:
        write_adapter(policy.model, state, folder)


def write_model(
    model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> None:
    """A folder that from_pretrained reads, in `dtype` whatever the type in memory is."""
    cast: dict[Tensor, Tensor] = {}  # by tensor, so that tied weights stay tied
    for value in state.values():
        if value not in cast:
            cast[value] = value.to(dtype) if value.is_floating_point() else value
    state = {name: cast[value] for name, value in state.items()}
    kept = model.config.dtype
    model.save_pretrained(str(folder), state_dict=state)
    model.config.dtype = dtype  # transformers wrote the one in memory, and readers go by it
    model.config.save_pretrained(str(folder))
    model.config.dtype = kept


def _gather(tensors: dict[str, Tensor], context: DistributedContext) -> dict[str, Tensor]:
    """One tensor after another, so that the others hold one whole tensor at a time."""
    gathered: dict[Tensor, Tensor] = {}  # by tensor, so that tied weights stay tied
    for tensor in tensors.values():
        if tensor not in gathered:
            value = full_tensor(tensor.detach())
            gathered[tensor] = value.cpu() if context.is_main else value.new_empty(0)
    return {name: gathered[t] for name, t in tensors.items()} if context.is_main else {}
