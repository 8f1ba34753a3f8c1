"""Layers of Llama and Qwen that store fewer activations: backward makes them again.

An MLP stores gate and up, neither silu(gate) nor the product that down_proj reads; an RMS norm
stores its input as it came, not in float32. Values and gradients are transformers' own bit for bit;
in float32 a norm's input adds its gradients up in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# transformers' classes that compute down(silu(gate(x)) * up(x)) and nothing else,
_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")
# and weight * (x / rms(x)), normalised in float32.
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm")


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


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), saving x in its own dtype (Zhang and Sennrich, 2019).

    Normalised in float32 and rounded to x's dtype before the weight. Values and gradients equal
    those of transformers' operations bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x` (..., D), `weight` (D,)."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of x and weight from `grad`, the result's."""
        x, weight, scale = ctx.saved_tensors
        wide, grad_x, grad_weight = x.float(), None, None
        if ctx.needs_input_grad[0]:
            grad_unit = (grad * weight).to(x.dtype).float()
            grad_scale = (grad_unit * wide).sum(-1, keepdim=True)
            grad_mean = -0.5 * grad_scale * scale.pow(3) / x.shape[-1]
            grad_x = (grad_unit * scale + grad_mean * (2 * wide)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * scale).to(x.dtype)).sum_to_size(weight.shape)
        return grad_x, grad_weight, None


def recompute_activations(model: PreTrainedModel, checkpointed: bool) -> None:
    """Make the model's MLPs and norms store less, in place; other kinds of layer are left alone.

    `checkpointed`: gradient checkpointing is on. A layer's activations are then dropped as they
    are, and down_proj's input with them.
    """
    silu = getattr(model.config.get_text_config(), "hidden_act", None) == "silu"
    for module in model.modules():
        name = type(module).__name__
        if name in _NORMS:
            module.forward = MethodType(_norm, module)
        elif name in _MLPS and silu:
            module.forward = MethodType(_checkpointed_mlp if checkpointed else _mlp, module)


def _norm(norm: Any, hidden_states: Tensor) -> Tensor:
    return RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)


def _checkpointed_mlp(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(SiluMul.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product = SiluMul.apply(gate, up)
    with _made_again(product, lambda: F.silu(gate) * up):
        return mlp.down_proj(product)


def _made_again(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """Context in which autograd saves of `tensor`, or of a view of all of it, the shape alone."""
    address, size, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype

    def pack(saved: Tensor) -> Tensor | torch.Size:
        same = (saved.data_ptr(), saved.numel(), saved.dtype) == (address, size, dtype)
        return saved.shape if same and saved.is_contiguous() else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else make().view(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
