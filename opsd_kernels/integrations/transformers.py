"""transformers: a causal LM's own loss without its logits, for Trainer and any training loop."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.integrations.bypass import bypassed_head, head_of_layer, replaced
from opsd_kernels.integrations.heads import (
    UnsupportedModel,
    causal_lm,
    logits_fault,
    probe_tokens,
    rounding_tolerance,
)


def fuse_loss(model: nn.Module) -> None:
    """Make `model(input_ids, labels=...)` compute its loss without the [tokens, vocabulary] logits.

    The loss is what `model.loss_function` gives (transformers' ForCausalLMLoss), with its
    arguments num_items_in_batch, shift_labels and ignore_index, and what the model adds to it, as
    the load-balancing loss of experts; except that a batch without labels to count gives 0, not
    NaN. `logits` of the output is None then. Without labels, in `generate` say, the model is what
    it was. Trainer's `compute_metrics` reads logits: evaluate without it, or call `unfuse_loss`.

    Args:
        model: a transformers causal LM, possibly wrapped by peft or torch.compile; its weights
            loaded, because a few tokens run through it to check that its loss is reproduced.

    Raises:
        UnsupportedModel (a ValueError): naming the model, if its loss or its logits are not those
            of its head, scale and softcap.
    """
    core = causal_lm(model)
    forward = _fused_forward(core)
    if forward is None:
        forward = _FusedForward(core)
        fault = _fault(core, forward)
        if fault:
            raise UnsupportedModel(f"{type(core).__name__} is not supported: {fault}")
        setattr(core, _ATTRIBUTE, forward)
        core.forward = forward
    forward.enabled = True


def unfuse_loss(model: nn.Module) -> None:
    """Give a model its own loss and logits back; does nothing to a model that has them."""
    core = causal_lm(model)
    forward = _fused_forward(core)
    if forward is None:
        return
    forward.enabled = False  # it may be inside a wrapper of accelerate's
    if "forward" in vars(core) and core.forward is forward:
        delattr(core, _ATTRIBUTE)
        del core.forward
        if forward.replaces_instance_attribute:
            core.forward = forward.original


_ATTRIBUTE = "opsd_fused_forward"


def _fused_forward(core: PreTrainedModel) -> _FusedForward | None:
    forward = getattr(core, _ATTRIBUTE, None)
    return forward if isinstance(forward, _FusedForward) else None


class _FusedForward:
    """A causal LM's forward that returns the loss and no logits when it gets labels."""

    def __init__(self, core: PreTrainedModel) -> None:
        functools.update_wrapper(self, core.forward)  # generate and Trainer read the signature
        self.core = core
        self.original = core.forward
        self.replaces_instance_attribute = "forward" in core.__dict__
        self.enabled = True
        self.names = list(inspect.signature(core.forward).parameters)

    # Attributes are set here; what it calls is compiled.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels", dict(zip(self.names, args, strict=False)).get("labels"))
        if labels is None or not self.enabled:
            return self.original(*args, **kwargs)
        with bypassed_head(self.core) as inputs:
            loss = functools.partial(causal_lm_loss, self.core, inputs)
            with replaced(self.core, "_loss_function", loss):
                output = self.original(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0], None, *output[2:])
        output.logits = None
        return output


def causal_lm_loss(
    core: PreTrainedModel,
    inputs: list[Tensor],  # of the output layer, the last one (..., T, D)
    logits: Tensor,
    labels: Tensor,  # (..., T)
    vocab_size: int,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss from the input of the output layer; `logits` is not read."""
    if not inputs:
        raise UnsupportedModel(f"{type(core).__name__} does not call its output layer")
    hidden, head = inputs[-1], head_of_layer(core)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    loss = fused_linear_cross_entropy(
        hidden, head.weight, shift_labels.to(hidden.device).reshape(hidden.shape[:-1]),
        bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale,
        ignore_index=ignore_index, num_tokens=num_items_in_batch,
    )  # fmt: skip
    return cast(Tensor, loss)


@torch.no_grad()
def _fault(core: PreTrainedModel, fused: _FusedForward) -> str | None:
    """What the fused loss gets wrong with this model; None if nothing."""
    training = core.training
    core.train(False)
    try:
        head = head_of_layer(core)
        pad_id = getattr(core.config.get_text_config(), "pad_token_id", None)
        tokens = probe_tokens(head, pad_id if isinstance(pad_id, int) else None)
        fault, _ = logits_fault(core, tokens)
        if fault:
            return fault
        ids = torch.tensor([tokens], device=head.weight.device)
        theirs, ours = (
            f(input_ids=ids, labels=ids, use_cache=False).loss for f in (fused.original, fused)
        )
        if not abs(ours - theirs) <= rounding_tolerance(head) * abs(theirs):
            return f"its loss is {theirs:.6g}, the loss from its head {ours:.6g}"
        return None
    except UnsupportedModel as error:
        return str(error)
    finally:
        core.train(training)
