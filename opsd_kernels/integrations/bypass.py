"""Running a causal LM without its output layer, so that its hidden states come out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from opsd_kernels.integrations.heads import (
    LmHead,
    UnsupportedModel,
    causal_lm,
    lm_head,
    output_layer,
)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of the object itself; after the block it is as before, or gone."""
    present, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if present:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def bypassed_head(core: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, the output layer returns its input; yields the list of these inputs, (..., T, D)."""
    inputs: list[Tensor] = []

    def identity(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    with replaced(output_layer(core), "forward", identity):
        yield inputs


@contextmanager
def hidden_as_logits(*models: nn.Module) -> Iterator[list[LmHead]]:
    """Inside, `.logits` of the models' outputs are the inputs of their heads, (B, T, D).

    Yields the list of the heads of these calls, in their order.
    """
    heads: list[LmHead] = []
    with ExitStack() as stack:
        for core in dict.fromkeys(map(causal_lm, models)):
            forward = functools.partial(_forward_to_head, core, core.forward, heads)
            stack.enter_context(replaced(core, "forward", forward))
        yield heads


def head_of_layer(core: PreTrainedModel) -> LmHead:
    """The head that takes the output layer's input, whole and without adapters.

    Raises UnsupportedModel if peft adapts the layer or if its weight is not whole here.
    """
    layer = output_layer(core)
    if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        raise UnsupportedModel(
            "the output layer is adapted by peft: leave lm_head out of target_modules and "
            "trainable_token_indices (modules_to_save is fine)"
        )
    head = lm_head(core, of_layer=True)
    if isinstance(head.weight, DTensor) or hasattr(head.weight, "ds_id"):
        raise UnsupportedModel(
            "the weight of the output layer is sharded: call fuse_loss before fully_shard and "
            "leave the layer in the root unit; DeepSpeed ZeRO-3 is not supported"
        )
    return head


def _forward_to_head(
    core: PreTrainedModel, forward: Any, heads: list[LmHead], *args: Any, **kwargs: Any
) -> Any:
    with bypassed_head(core) as inputs:
        output = forward(*args, **kwargs)
    if not inputs:
        raise UnsupportedModel(f"{type(core).__name__} does not call its output layer")
    head = head_of_layer(core)
    heads.append(head)
    # DistributedDataParallel looks for used parameters in the graph of the model's output.
    trained = [p for p in (head.weight, head.bias) if p is not None and p.requires_grad]
    attach: Any = _Attached.apply
    output.logits = attach(inputs[-1], *trained) if trained else inputs[-1]
    return output


class _Attached(torch.autograd.Function):
    """A tensor unchanged, with parameters in its graph that get no gradient through it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (grads[0], *[None] * ctx.parameters)
