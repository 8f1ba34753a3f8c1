"""Refuses derivatives that the fused losses do not have and PyTorch would return as zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _functorch
from torch.autograd import forward_ad


def reverse_mode_only(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError for a tensor that forward mode or torch.func differentiates.

    `torch.func.vmap` of a loss without gradients is allowed: one call per entry.
    """
    # torch.compile cannot trace the functorch queries, and refuses torch.func.grad by itself.
    eager = not torch.compiler.is_compiling()
    inside = eager and torch.is_grad_enabled() and _are_functorch_transforms_active()
    while True:
        if not (eager and _functorch.is_batchedtensor(tensor)):
            if forward_ad.unpack_dual(tensor).tangent is not None:
                _refuse(name, "forward mode (jvp, jacfwd)")
            if inside and tensor.requires_grad:
                _refuse(name, "torch.func.grad, vjp, jacrev or gradients through vmap")
        if not (eager and _functorch.is_functorch_wrapped_tensor(tensor)):
            return
        tensor = _functorch.get_unwrapped(tensor)


def _refuse(name: str, what: str) -> None:
    raise RuntimeError(
        f"{name}: the fused losses do not support {what}; "
        "use backward() or torch.autograd.grad on the loss"
    )
