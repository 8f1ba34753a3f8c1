"""Write trained weights in the formats of other libraries: PEFT adapter or transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import full_tensor
from opsd_train.model.adapters import trained_weights, write_adapter
from opsd_train.model.policy import Policy


def save_weights(
    policy: Policy, tokenizer: Any, run_dir: Path, context: DistributedContext
) -> Path:
    """Write run_dir/adapter if adapters are trained, else run_dir/model. Every rank calls it."""
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
    """Write the adapter in PEFT's format. Every rank calls it."""
    state = _gather(trained_weights(policy.model), context)
    if context.is_main:
        write_adapter(policy.model, state, folder)


def write_model(model: Any, state: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Write a transformers `model` to a folder for from_pretrained, its weights cast to `dtype`."""
    cast: dict[Tensor, Tensor] = {}  # keyed by tensor, so that tied weights stay tied
    for value in state.values():
        if value not in cast:
            cast[value] = value.to(dtype) if value.is_floating_point() else value
    state = {name: cast[value] for name, value in state.items()}
    kept = model.config.dtype
    model.save_pretrained(str(folder), state_dict=state)
    model.config.dtype = dtype  # save_pretrained wrote the dtype in memory, which readers go by
    model.config.save_pretrained(str(folder))
    model.config.dtype = kept


def _gather(tensors: Mapping[str, Tensor], context: DistributedContext) -> dict[str, Tensor]:
    """Full tensors on the CPU of rank 0; the other ranks hold one full tensor at a time."""
    gathered: dict[Tensor, Tensor] = {}  # keyed by tensor, so that tied weights stay tied
    for tensor in tensors.values():
        if tensor not in gathered:
            value = full_tensor(tensor.detach())
            gathered[tensor] = value.cpu() if context.is_main else value.new_empty(0)
    return {name: gathered[t] for name, t in tensors.items()} if context.is_main else {}
