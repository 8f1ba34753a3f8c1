"""Models of many families: what training needs beside the head, and the check at load."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_kernels.integrations.heads import (
    LmHead,
    UnsupportedModel,
    backbone,
    lm_head,
    logits_fault,
    probe_tokens,
)
from opsd_train.config.errors import UserError
from opsd_train.data.layout import PADDED, Batch, Layout, make_batch

# Values of the config's layer_types whose layers read other tokens through attention only.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse"}

# The names by which configs limit how far back some layer's attention reads.
_WINDOWS = (
    *("sliding_window", "sliding_window_size", "window_size", "attention_window_size"),
    *("attention_chunk_size", "local_attention", "keep_window_size"),
)

_PREFIX = 5  # tokens of the shorter of two probe sequences, a prefix of the longer one


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
    options: dict[str, Tensor] = {}
    if batch.mask is not None:
        eager = core.config._attn_implementation == "eager"
        options["attention_mask"] = _additive(batch.mask, core.dtype) if eager else batch.mask
    output = backbone(core)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **options,
    )
    return output.last_hidden_state[batch.rows, batch.columns]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True, else the least number of `dtype`: what eager attention adds."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


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
    except UnsupportedModel as error:
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
    head = lm_head(core)
    tokens, device = probe_tokens(head, pad_id), head.weight.device
    fault, own = logits_fault(core, tokens)
    if fault or own is None:
        return fault
    wanted = torch.cat([own[0, : _PREFIX - 1], own[0, :-1]])
    gap = _gap(completion_hidden(core, _pair(tokens, pad_id, device, PADDED)), wanted)
    if not gap <= batching_tolerance(head):
        return f"hidden states change when a longer sequence is in the batch (gap {gap:.1g})"
    return None


def batch_layout(core: PreTrainedModel, pad_id: int) -> Layout:
    """How sequences lie in this model's batches; `core` is one that passed `check_logits`."""
    if supports_packing(core, pad_id):
        return Layout("packed")
    shared = shared_layout(core)
    return shared if shared and _shares(core, shared, pad_id) else PADDED


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
    packed, padded = (
        _pair(tokens, pad_id, head.weight.device, layout) for layout in (Layout("packed"), PADDED)
    )
    gap = _gap(completion_hidden(core, packed), completion_hidden(core, padded))
    return gap <= batching_tolerance(head)


def shared_layout(core: PreTrainedModel) -> Layout | None:
    """The layout in which completions share their prompt; None if this kind of model has none.

    FlashAttention takes no mask. Recurrent and convolutional layers carry the state of one
    completion into the next.
    """
    masks = core.config._attn_implementation in ("sdpa", "eager")
    if not masks or not core._supports_attention_backend or _carries_state(core):
        return None
    config = core.config.get_text_config()
    windows = [getattr(config, name, None) for name in _WINDOWS]
    window = min((window for window in windows if window), default=math.inf)
    return Layout("shared", config.hidden_size, window)


@torch.no_grad()
def _shares(core: PreTrainedModel, layout: Layout, pad_id: int) -> bool:
    """Whether the model hands mask and positions on to its attention as they are: tried here."""
    head = lm_head(core)
    tokens = probe_tokens(head, pad_id)
    # The second completion must not read the first, which is long.
    prompts, completions = [tokens[:2]] * 2, [tokens[2:] * 4, tokens[3:]]
    shared, padded = (
        make_batch(prompts, completions, pad_id, head.weight.device, each)
        for each in (replace(layout, hidden_size=10**6), PADDED)
    )
    if shared.mask is None:  # the window is shorter than these few tokens
        return False
    try:
        found = completion_hidden(core, shared)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model of another kind may fail anywhere
        return False
    gap = _gap(found, completion_hidden(core, padded), len(completions[0]))
    return gap <= batching_tolerance(head)


def batching_tolerance(head: LmHead) -> float:
    """Largest relative error from rounding when the same tokens run in a different batch."""
    return 0.1 if torch.finfo(head.weight.dtype).eps > 1e-4 else 1e-3


def _carries_state(core: PreTrainedModel) -> bool:
    """Whether some layer reads earlier tokens other than by attention."""
    kinds = set(getattr(core.config.get_text_config(), "layer_types", None) or ())
    convolves = any(isinstance(module, nn.Conv1d) for module in backbone(core).modules())
    return core._is_stateful or convolves or not kinds <= _ATTENTION


def _pair(tokens: list[int], pad_id: int, device: torch.device, layout: Layout) -> Batch:
    """A batch of two sequences, a prefix of `tokens` and all of them; the first token prompts."""
    sequences = tokens[:_PREFIX], tokens
    prompts, completions = [ids[:1] for ids in sequences], [ids[1:] for ids in sequences]
    return make_batch(prompts, completions, pad_id, device, layout)


def _gap(found: Tensor, wanted: Tensor, first: int = _PREFIX - 1) -> float:
    """Relative error of the (N, D) hidden states of two sequences, of which the first has `first`
    tokens, by default that of `_pair`: each one's median, the larger."""
    wanted = wanted.float()
    gaps = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return max(part.median().item() for part in gaps.split([first, len(gaps) - first]))
