"""How a model's logits follow from its hidden states: a table of families, checked at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_train.config.errors import UserError
from opsd_train.data.batches import Batch, make_batch


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


# By the text config's model_type; a model that is not listed has no scale. Granite and
# HyperCLOVA X use logits_scaling in opposite ways.
FAMILIES = {
    **dict.fromkeys(
        ("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"), Family(multiply="logit_scale")
    ),
    **dict.fromkeys(
        (
            *("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"),
            *("granite_swa", "granitemoe_swa", "granite4_vision_text", "minicpm3"),
        ),
        Family(divide="logits_scaling"),
    ),
    "falcon_h1": Family(multiply="lm_head_multiplier"),
    "hyperclovax": Family(multiply="logits_scaling"),
    "inkling_text": Family(divide="logits_mup_width_multiplier"),
    "muse_glimmer_text": Family(multiply="output_multiplier"),
    "muse_spark_text": Family(multiply="output_multiplier"),
    "recurrent_gemma": Family(softcap="logits_soft_cap"),
    "xlstm": Family(softcap="output_logit_soft_cap"),
}

# Values of the config's layer_types whose layers read other tokens through attention only.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse"}

# Lengths of the two probe sequences: the shorter one is a prefix of the longer one.
_TOKENS, _PREFIX = 8, 5


def lm_head(model: PreTrainedModel | PeftModel) -> LmHead:
    """The model's head, tied to the embeddings or not; it shares the model's tensors.

    Raises UserError if the model has no single output layer.
    """
    core = causal_lm(model)
    layer, config = core.get_output_embeddings(), core.config.get_text_config()
    if layer is None:
        raise UserError(f"{type(core).__name__} is not supported: it has no single output layer")
    family = FAMILIES.get(config.model_type, Family())
    scale = 1.0
    if family.multiply:
        scale = float(getattr(config, family.multiply))
    elif family.divide:
        scale = 1 / getattr(config, family.divide)
    softcap = getattr(config, family.softcap, None)
    return LmHead(layer.weight, getattr(layer, "bias", None), softcap, scale)


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM itself, without peft's wrapper; adapters stay in it."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def backbone(core: PreTrainedModel) -> PreTrainedModel:
    """The layers below the head; their forward returns last_hidden_state, (B, T, D).

    Raises UserError if `get_decoder()` returns something else.
    """
    decoder = core.get_decoder()
    if decoder is core or not isinstance(decoder, PreTrainedModel):
        raise UserError(
            f"get_decoder() returns {type(decoder).__name__}, not the layers below the head"
        )
    return decoder


def decoder_layers(core: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of the backbone, under whatever name.

    Raises UserError if the backbone has no list of that many modules.
    """
    count = core.config.get_text_config().num_hidden_layers
    for module in backbone(core).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(core).__name__} cannot be sharded: it has no list of {count} layers")


def completion_hidden(core: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states at the positions that predict the batch's N completion tokens, (N, D)."""
    output = backbone(core)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state[batch.rows, batch.columns]


@torch.no_grad()
def check_logits(core: PreTrainedModel, name: str, pad_id: int) -> None:
    """Check that the model's own logits are what the losses compute from hidden states and head.

    `core`: a causal LM with full weights, before adapters are added; `name`: the model's name for
    the error. Takes two forward passes over a few tokens. Raises UserError if the logits differ by
    more than rounding, or if padding changes the hidden states.
    """
    training = core.training
    core.eval()
    fault: str | None
    try:
        fault = _fault(core, pad_id)
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        fault = str(error)
    except Exception as error:  # a model of another kind may fail anywhere
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:70]
    finally:
        core.train(training)
    if fault:
        line = f"model {name} ({type(core).__name__}) is not supported: {fault}"
        raise UserError(f"{line}; please report the class")


def _fault(core: PreTrainedModel, pad_id: int) -> str | None:
    """What the losses would get wrong with this model; None if nothing."""
    decoder, head = backbone(core), lm_head(core)
    tokens, device = probe_tokens(head, pad_id), head.weight.device
    # Small hidden states reveal a bias, large ones a softcap; powers of two scale without rounding.
    amplitude = 2.0 ** torch.arange(-4, 2 * _TOKENS - 4, 2, device=device)[:, None]
    own: list[Tensor] = []

    def amplify(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        own.append(output.last_hidden_state)
        output.last_hidden_state = own[0] * amplitude.to(own[0].dtype)
        return output

    with decoder.register_forward_hook(amplify):
        output = core(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    if not own:
        return f"its logits do not come from {type(decoder).__name__}"
    theirs = output.logits.float()
    ours = head_logits(own[0] * amplitude.to(own[0].dtype), head)
    if ours.shape != theirs.shape:
        return f"its logits are {theirs.shape[-1]} wide, its head {ours.shape[-1]}"
    gap = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()
    if not gap <= rounding_tolerance(head):
        return f"its logits are not the scaled and capped output of its head (gap {gap:.1g})"
    wanted = torch.cat([own[0][0, : _PREFIX - 1], own[0][0, :-1]])
    gap = _gap(completion_hidden(core, _pair(tokens, pad_id, device, packed=False)), wanted)
    if not gap <= batching_tolerance(head):
        return f"hidden states change when a longer sequence is in the batch (gap {gap:.1g})"
    return None


@torch.no_grad()
def supports_packing(core: PreTrainedModel, pad_id: int) -> bool:
    """Whether one row may hold several sequences, separated by positions that restart at 0.

    `core`: a model that passed `check_logits`. FlashAttention's kernels separate the sequences, if
    the model passes the positions on to them, which is tried here; other attention would need a
    mask tensor. Recurrent and convolutional layers carry their state across the boundary.
    """
    if not core.config._attn_implementation.startswith("flash_attention") or _carries_state(core):
        return False
    head = lm_head(core)
    tokens = probe_tokens(head, pad_id)
    packed, padded = (_pair(tokens, pad_id, head.weight.device, mode) for mode in (True, False))
    gap = _gap(completion_hidden(core, packed), completion_hidden(core, padded))
    return gap <= batching_tolerance(head)


def probe_tokens(head: LmHead, pad_id: int) -> list[int]:
    """8 random token ids without padding, the same each time; leaves torch's generator alone."""
    rows = head.weight.shape[0]
    ids = torch.randint(rows, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    ids[ids == pad_id] = (pad_id + 1) % rows
    return ids.tolist()


def rounding_tolerance(head: LmHead) -> float:
    """Largest relative error of logits that are rounded to the head's dtype a few times."""
    return 4 * max(torch.finfo(head.weight.dtype).eps, 1e-6)


def batching_tolerance(head: LmHead) -> float:
    """Largest relative error from rounding when the same tokens run in a different batch."""
    return 0.1 if torch.finfo(head.weight.dtype).eps > 1e-4 else 1e-3


def _carries_state(core: PreTrainedModel) -> bool:
    """Whether some layer reads earlier tokens other than by attention."""
    kinds = set(getattr(core.config.get_text_config(), "layer_types", None) or ())
    convolves = any(isinstance(module, nn.Conv1d) for module in backbone(core).modules())
    return core._is_stateful or convolves or not kinds <= _ATTENTION


def _pair(tokens: list[int], pad_id: int, device: torch.device, packed: bool) -> Batch:
    """A batch of two sequences, a prefix of `tokens` and all of them; the first token prompts."""
    sequences = tokens[:_PREFIX], tokens
    prompts, completions = [ids[:1] for ids in sequences], [ids[1:] for ids in sequences]
    return make_batch(prompts, completions, pad_id, device, packed)


def _gap(found: Tensor, wanted: Tensor) -> float:
    """Relative error of the (N, D) hidden states of `_pair`: each sequence's median, the larger."""
    wanted = wanted.float()
    gaps = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return max(part.median().item() for part in gaps.split([_PREFIX - 1, _TOKENS - 1]))


def head_logits(hidden: Tensor, head: LmHead) -> Tensor:
    """The head's logits of `hidden` (..., D), as the model computes them: (..., V), float32.

    The matrix product runs in the head's dtype, scale and softcap in float32.
    """
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits
