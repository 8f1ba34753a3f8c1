"""Layers of Llama and Qwen that store fewer activations: backward makes them again.

An RMS norm stores its input as it came, not in float32; the projections that read its result store
nothing. An MLP stores gate and up, neither silu(gate) nor the product that down_proj reads. Values
and gradients are transformers' own bit for bit; in float32 a norm's input adds its gradients up in
another order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
# transformers' classes that compute down(silu(gate(x)) * up(x)) and nothing else,
_MLPS = tuple(f"{family}MLP" for family in _FAMILIES)
# weight * (x / rms(x)), normalised in float32,
_NORMS = tuple(f"{family}RMSNorm" for family in _FAMILIES)
# and the attention of such a norm's result.
_ATTENTIONS = tuple(f"{family}Attention" for family in _FAMILIES)


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


class _Remade:
    """A tensor that is stored several times: made at its first use in backward, kept to its last.

    Stored are only the shapes of its views.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self.make, self.key = make, _key(tensor)
        self.made: Tensor | None = None
        self.stored = self.used = 0

    def pack(self, saved: Tensor) -> Tensor | torch.Size:
        """The shape of a view of all of the tensor; another tensor as it is."""
        if _key(saved) != self.key or not saved.is_contiguous():
            return saved
        self.stored += 1
        return saved.shape

    def unpack(self, packed: Tensor | torch.Size) -> Tensor:
        """The tensor in that shape."""
        if isinstance(packed, Tensor):
            return packed
        made = self.make() if self.made is None else self.made
        self.used += 1
        self.made = None if self.used % self.stored == 0 else made
        return made.view(packed)


def recompute_activations(model: PreTrainedModel, checkpointed: bool) -> None:
    """Make norms, attention and MLPs store less, in place; other kinds of layer are left alone.

    `checkpointed`: gradient checkpointing is on. A layer's activations are then dropped as they
    are, and what is made again here with them.
    """
    silu = getattr(model.config.get_text_config(), "hidden_act", None) == "silu"
    for module in model.modules():
        name = type(module).__name__
        if name in _NORMS:
            module.forward = MethodType(_norm, module)
        elif name in _MLPS and silu:
            module.forward = MethodType(_checkpointed_mlp if checkpointed else _mlp, module)
        elif name in _ATTENTIONS and not checkpointed:
            module.forward = MethodType(_attention, module)


def _norm(norm: Any, hidden_states: Tensor) -> Tensor:
    return RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)


def _attention(attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    with _made_from_norm(hidden_states):
        return type(attention).forward(attention, hidden_states, *args, **kwargs)


def _checkpointed_mlp(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(SiluMul.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    with _made_from_norm(x):
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product = SiluMul.apply(gate, up)
    with _made_again(product, lambda: F.silu(gate) * up):
        return mlp.down_proj(product)


def _made_from_norm(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autograd stores nothing of x if it is the result of an RMS norm."""
    if not isinstance(x.grad_fn, RmsNorm._backward_cls):
        return nullcontext()
    norm: Any = x.grad_fn

    def make() -> Tensor:
        before, weight, scale = norm.saved_tensors
        return weight * (before.float() * scale).to(before.dtype)

    return _made_again(x, make)


def _made_again(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """Context in which autograd stores no view of all of `tensor`: backward makes it."""
    remade = _Remade(tensor, make)
    return torch.autograd.graph.saved_tensors_hooks(remade.pack, remade.unpack)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    # Not data_ptr(), which a dry run's tensors do not have.
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.numel(), tensor.dtype
