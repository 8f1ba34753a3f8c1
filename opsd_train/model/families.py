"""From a model's hidden states to its logits: a table of families, and a proof for each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_train.config.errors import UserError
from opsd_train.data.batches import Batch, make_batch


@dataclass(frozen=True)
class LmHead:
    """The last layer: logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None  # c in c * tanh(logits / c)
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Family:
    """Config attributes that change the logits. All models scale first and cap last."""

    multiply: str | None = None
    divide: str | None = None
    softcap: str = "final_logit_softcapping"


# By the model_type of the text config; what is not named here has no scale. Granite and
# HyperCLOVA X share an attribute, and use it in opposite ways.
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

# Layers that read other tokens through attention alone.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse"}

_TOKENS, _PREFIX = 8, 5  # of the proof: a sequence, and the part of it that is a shorter one


def lm_head(model: nn.Module) -> LmHead:
    """The one way to the head, tied to the embeddings or not."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
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


def backbone(core: nn.Module) -> nn.Module:
    """The causal LM without its head: gives last_hidden_state."""
    decoder = core.get_decoder()
    if decoder is core or not isinstance(decoder, PreTrainedModel):
        raise UserError(
            f"get_decoder() gives {type(decoder).__name__}, not the layers below the head"
        )
    return decoder


def layers(core: nn.Module) -> nn.ModuleList:
    """The blocks of the backbone, whatever it calls them."""
    count = core.config.get_text_config().num_hidden_layers
    for module in backbone(core).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(core).__name__} cannot be sharded: it has no list of {count} layers")


def completion_hidden(core: nn.Module, batch: Batch) -> Tensor:
    """(N, D) last hidden states at the positions that predict completion tokens."""
    output = backbone(core)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state[batch.rows, batch.columns]


@torch.no_grad()
def prove(core: nn.Module, name: str, pad_id: int) -> None:
    """Compare the model's own logits with what the losses make of its hidden states and head.

    `core`: a causal LM with whole weights, before adapters; `name`: for the error. Two forward
    passes over a few tokens. Raises UserError where they differ by more than rounding.
    """
    training = core.training
    core.eval()
    try:
        fault = _fault(core, pad_id)
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        fault = str(error)
    except Exception as error:  # whatever a model of another shape trips over
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:70]
    finally:
        core.train(training)
    if fault:
        line = f"model {name} ({type(core).__name__}) is not supported: {fault}"
        raise UserError(f"{line}; please report the class")


def _fault(core: nn.Module, pad_id: int) -> str | None:
    """What the losses would get wrong."""
    decoder, head = backbone(core), lm_head(core)
    tokens, device = proof_tokens(head, pad_id), head.weight.device
    # Small ones show a bias, large ones a softcap; powers of two, so that nothing is rounded.
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
    if not gap <= rounding(head):
        return f"its logits are not a scaled and capped product with its head (gap {gap:.1g})"
    wanted = torch.cat([own[0][0, : _PREFIX - 1], own[0][0, :-1]])
    gap = _gap(completion_hidden(core, _pair(tokens, pad_id, device, packed=False)), wanted)
    if not gap <= tolerance(head):
        return f"a sequence beside a longer one has other hidden states (gap {gap:.1g})"
    return None


@torch.no_grad()
def packs(core: nn.Module, pad_id: int) -> bool:
    """Whether one row can hold several sequences of a proved model, told apart by positions.

    FlashAttention goes by the positions where the model hands them on, which is tried here; the
    state of a recurrent or convolutional layer never does.
    """
    if not core.config._attn_implementation.startswith("flash_attention") or _carries_state(core):
        return False
    head = lm_head(core)
    tokens = proof_tokens(head, pad_id)
    batches = [_pair(tokens, pad_id, head.weight.device, packed) for packed in (True, False)]
    return _gap(*(completion_hidden(core, batch) for batch in batches)) <= tolerance(head)


def proof_tokens(head: LmHead, pad_id: int) -> list[int]:
    """Random tokens, alike each time, without torch's global generator and without padding."""
    rows = head.weight.shape[0]
    ids = torch.randint(rows, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    ids[ids == pad_id] = (pad_id + 1) % rows
    return ids.tolist()


def rounding(head: LmHead) -> float:
    """Relative gap of logits that are rounded a few times."""
    return 4 * max(torch.finfo(head.weight.dtype).eps, 1e-6)


def tolerance(head: LmHead) -> float:
    """Relative gap that rounding alone makes where the same tokens stand in another batch."""
    return 0.1 if torch.finfo(head.weight.dtype).eps > 1e-4 else 1e-3


def _carries_state(core: nn.Module) -> bool:
    """Whether a layer reads earlier tokens in another way than by attention."""
    kinds = set(getattr(core.config.get_text_config(), "layer_types", None) or ())
    convolves = any(isinstance(module, nn.Conv1d) for module in backbone(core).modules())
    return core._is_stateful or convolves or not kinds <= _ATTENTION


def _pair(tokens: list[int], pad_id: int, device: torch.device, packed: bool) -> Batch:
    """A sequence and its beginning; all but the first token of each are predicted."""
    texts = tokens[:_PREFIX], tokens
    prompts, completions = [text[:1] for text in texts], [text[1:] for text in texts]
    return make_batch(prompts, completions, pad_id, device, packed)


def _gap(found: Tensor, wanted: Tensor) -> float:
    """Of (N, D) hidden states of `_pair`, relative; the larger of its sequences' medians."""
    wanted = wanted.float()
    gaps = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return max(part.median().item() for part in gaps.split([_PREFIX - 1, _TOKENS - 1]))


def head_logits(hidden: Tensor, head: LmHead) -> Tensor:
    """(..., V) float32, the product in the weights' type as the model makes it."""
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits
