"""Llama's and Qwen's MLP with one activation less in memory: backward computes silu(gate) again."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Those of transformers that are down(silu(gate(x)) * up(x)) and nothing else.
_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")


class SiluMul(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up; results and gradients are those of the two
    operations to the last bit."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def save_memory(model: nn.Module) -> None:
    """Use it in the MLPs that have this form; others stay as they are."""
    if getattr(model.config.get_text_config(), "hidden_act", None) != "silu":
        return
    for module in model.modules():
        if type(module).__name__ in _MLPS:
            module.forward = MethodType(_forward, module)


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(SiluMul.apply(mlp.gate_proj(x), mlp.up_proj(x)))
