"""Trained weights as files that other programs read: PEFT's adapter, or a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from opsd_train.model import Policy
from opsd_train.parallel import whole
from opsd_train.world import World


def save_weights(policy: Policy, tokenizer: Any, run_dir: Path, world: World) -> Path:
    """run_dir/adapter where adapters are trained, else run_dir/model. Every rank calls it."""
    if policy.has_adapters:
        return save_adapter(policy, run_dir / "adapter", world)
    folder = run_dir / "model"
    state = _whole_state(policy.core, world)
    if world.leads:
        in_dtype = {name: value.to(policy.dtype) for name, value in state.items()}
        policy.core.save_pretrained(str(folder), state_dict=in_dtype)
        tokenizer.save_pretrained(str(folder))
    return folder


def save_adapter(policy: Policy, folder: Path, world: World) -> Path:
    """The adapter in PEFT's own format. Every rank calls it."""
    state = adapter_state(policy, world)
    if world.leads:
        policy.model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    return folder


def adapter_state(policy: Policy, world: World) -> dict[str, Tensor]:
    """Name and whole value of each adapter weight, on rank 0. Every rank calls it."""
    trained = {n: p.detach() for n, p in policy.model.named_parameters() if p.requires_grad}
    return _gather(trained, world)


def _whole_state(core: Any, world: World) -> dict[str, Tensor]:
    return _gather(core.state_dict(), world)


def _gather(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """One tensor after another, so that the others hold one whole tensor at a time."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if world.leads:
            gathered[name] = value.cpu()
    return gathered
