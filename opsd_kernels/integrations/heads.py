"""How a causal LM's logits follow from its hidden states: a table of families, and a proof."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class UnsupportedModel(ValueError):
    """A model whose logits the losses cannot compute; the message says why in one line."""


@dataclass(frozen=True)
class LmHead:
    """The output layer: logits = cap(logit_scale * (hidden @ weight.T + bias)).

    cap(x) = softcap * tanh(x / softcap), or x if softcap is None.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Family:
    """Names of the config attributes that change the logits. Every model scales, then caps."""

    multiply: str | None = None  # the logits are multiplied by this attribute ...
    divide: str | None = None  # ... or divided by this one
    softcap: str = "final_logit_softcapping"  # LmHead.softcap
    before_layer: bool = False  # the scale is applied to the output layer's input


# By the text config's model_type; a model that is not listed has no scale. Granite and
# HyperCLOVA X use logits_scaling in opposite ways.
FAMILIES = {
    **dict.fromkeys(
        ("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"), Family(multiply="logit_scale")
    ),
    **dict.fromkeys(
        (
            *("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"),
            *("granite_swa", "granitemoe_swa", "granite4_vision_text"),
        ),
        Family(divide="logits_scaling"),
    ),
    "falcon_h1": Family(multiply="lm_head_multiplier"),
    "hyperclovax": Family(multiply="logits_scaling"),
    "inkling_text": Family(divide="logits_mup_width_multiplier", before_layer=True),
    "minicpm3": Family(divide="logits_scaling", before_layer=True),
    "muse_glimmer_text": Family(multiply="output_multiplier"),
    "muse_spark_text": Family(multiply="output_multiplier"),
    "recurrent_gemma": Family(softcap="logits_soft_cap"),
    "xlstm": Family(softcap="output_logit_soft_cap"),
}

_TOKENS = 8


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, without the wrappers of torch.compile and peft; adapters stay in it.

    Raises TypeError if there is none.
    """
    core = getattr(model, "_orig_mod", model)
    if hasattr(core, "get_base_model"):  # peft.PeftModel
        core = cast(Any, core).get_base_model()
    if not isinstance(core, PreTrainedModel):
        raise TypeError(f"model: expected a transformers causal LM, got {type(model).__name__}")
    return core


def lm_head(model: nn.Module, of_layer: bool = False) -> LmHead:
    """The model's head, tied to the embeddings or not; it shares the model's tensors.

    It takes the hidden states of the backbone or, `of_layer`, the input of the output layer: the
    same, but for families that scale between the two.

    Raises UnsupportedModel if the model has no single output layer.
    """
    core = causal_lm(model)
    layer, config = output_layer(core), core.config.get_text_config()
    family = FAMILIES.get(config.model_type, Family())
    scale = 1.0
    if family.multiply:
        scale = float(getattr(config, family.multiply))
    elif family.divide:
        scale = 1 / getattr(config, family.divide)
    if of_layer and family.before_layer:
        scale = 1.0
    softcap = getattr(config, family.softcap, None)
    weight = cast(Tensor, layer.weight)
    return LmHead(weight, cast("Tensor | None", getattr(layer, "bias", None)), softcap, scale)


def output_layer(core: PreTrainedModel) -> nn.Module:
    """The layer whose output is the logits before scale and softcap."""
    layer = core.get_output_embeddings()  # type: ignore[no-untyped-call]
    if layer is None:
        raise UnsupportedModel(
            f"{type(core).__name__} is not supported: it has no single output layer"
        )
    return cast(nn.Module, layer)


def backbone(core: PreTrainedModel) -> PreTrainedModel:
    """The layers below the head; their forward returns last_hidden_state, (B, T, D).

    Raises UnsupportedModel if `get_decoder()` returns something else.
    """
    decoder = core.get_decoder()  # type: ignore[no-untyped-call]
    if decoder is core or not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModel(
            f"get_decoder() returns {type(decoder).__name__}, not the layers below the head"
        )
    return decoder


def head_logits(hidden: Tensor, head: LmHead) -> Tensor:
    """The head's logits of `hidden` (..., D), as the model computes them: (..., V), float32.

    The matrix product runs in the head's dtype, scale and softcap in float32.
    """
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


@torch.no_grad()
def logits_fault(core: PreTrainedModel, tokens: list[int]) -> tuple[str | None, Tensor | None]:
    """What `lm_head` gets wrong about this model, None if nothing; and the (1, T, D) hidden states.

    `core`: a causal LM in eval mode without adapters; it runs once over `tokens` (at most 8), with
    hidden states of every size from 2^-4 to 2^10 times its own.
    """
    decoder, head = backbone(core), lm_head(core)
    device = head.weight.device
    # Small hidden states reveal a bias, large ones a softcap; powers of two scale without rounding.
    amplitude = 2.0 ** torch.arange(-4, 2 * len(tokens) - 4, 2, device=device)[:, None]
    own: list[Tensor] = []

    def amplify(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        own.append(output.last_hidden_state)
        output.last_hidden_state = own[0] * amplitude.to(own[0].dtype)
        return output

    with decoder.register_forward_hook(amplify):
        output = core(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    if not own:
        return f"its logits do not come from {type(decoder).__name__}", None
    theirs = output.logits.float()
    ours = head_logits(own[0] * amplitude.to(own[0].dtype), head)
    if ours.shape != theirs.shape:
        return f"its logits are {theirs.shape[-1]} wide, its head {ours.shape[-1]}", own[0]
    gap = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()
    if not gap <= rounding_tolerance(head):
        fault = f"its logits are not the scaled and capped output of its head (gap {gap:.1g})"
        return fault, own[0]
    return None, own[0]


def probe_tokens(head: LmHead, pad_id: int | None) -> list[int]:
    """8 random token ids without padding, the same each time; leaves torch's generator alone."""
    rows = head.weight.shape[0]
    ids = torch.randint(rows, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    if pad_id is not None:
        ids[ids == pad_id] = (pad_id + 1) % rows
    return cast("list[int]", ids.tolist())


def rounding_tolerance(head: LmHead) -> float:
    """Largest relative error of logits that are rounded to the head's dtype a few times."""
    return 4 * max(torch.finfo(head.weight.dtype).eps, 1e-6)
