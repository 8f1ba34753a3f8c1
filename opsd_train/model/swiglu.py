"""SwiGLU MLPs of Llama and Qwen that store one activation less: backward recomputes silu(gate)."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# The MLP classes of transformers that compute down(silu(gate(x)) * up(x)) and nothing else.
_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")


class SiluMul(torch.autograd.Function):
    """silu(gate) * up, saving gate and up only.

    Values and gradients equal those of the two separate operations bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """`gate`, `up` and the result: the same shape and dtype."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up from `grad`, the gradient of the product."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def recompute_silu(model: PreTrainedModel) -> None:
    """Make the model's MLPs use SiluMul, in place; other kinds of MLP are left alone."""
    if getattr(model.config.get_text_config(), "hidden_act", None) != "silu":
        return
    for module in model.modules():
        if type(module).__name__ in _MLPS:
            module.forward = MethodType(_forward, module)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(SiluMul.apply(mlp.gate_proj(x), mlp.up_proj(x)))
