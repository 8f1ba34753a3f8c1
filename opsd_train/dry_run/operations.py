"""What a decoder layer asks of a device: each operation's arithmetic and bytes, from shapes alone.

The model's own code runs on tensors without memory, and every operation that PyTorch would start is
noted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from opsd_train.config.schema import LoraConfig, ModelConfig
from opsd_train.dry_run.largest_step import Rows
from opsd_train.model.adapters import add_adapters
from opsd_train.model.families import decoder_layers
from opsd_train.model.policy import Policy, attention, checkpoint_activations, load_model_config
from opsd_train.model.recompute import recompute_activations

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_ATTENTION = "_scaled_dot_product"
# They read as much of their input as they write.
_PICKING = {"embedding", "index", "index_select", "gather", "new_zeros", "zeros_like"}
# They allocate, or say where tensors are.
_FREE = {"detach", "empty_like", "new_empty", "empty", "device", "_unsafe_view"}


@dataclass(frozen=True)
class Operation:
    """One operation: floating-point operations of its products, and bytes that it moves."""

    kind: str  # "product", "attention" or "memory"
    flops: float
    bytes: float
    itemsize: int  # bytes of an operand's element


class Recorder(TorchDispatchMode):
    """Context that notes every operation in `found`, also those of a backward pass on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _FREE and not func.is_view:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if written:
                self.found.append(_operation(name, func, args, kwargs or {}, read, written))
        return out


def _operation(
    name: str,
    func: Any,
    args: Sequence[Any],
    kwargs: Any,
    read: list[Tensor],
    written: list[Tensor],
) -> Operation:
    moved = sum(map(_bytes, written))
    moved += moved if name in _PICKING else sum(map(_bytes, read))
    itemsize = written[0].element_size()
    if name in _PRODUCTS:
        left, right = args[-2], args[-1]
        return Operation("product", 2.0 * left.numel() * right.shape[-1], moved, itemsize)
    if name.startswith(_ATTENTION):
        return Operation("attention", _attention_flops(name, func, args, kwargs), moved, itemsize)
    return Operation("memory", 0.0, moved, itemsize)


def _attention_flops(name: str, func: Any, args: Sequence[Any], kwargs: Any) -> float:
    """Two products of all pairs of query and key forward, five backward; half of it if causal."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key = given["query"], given["key"]
    products = 5 if name.endswith("backward") else 2
    pairs = query.numel() * key.shape[-2]
    return 2.0 * products * pairs * (0.5 if given.get("is_causal") else 1.0)


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor is read from the memory that it has."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class CountedLayer:
    """A decoder layer of the recipe's model: which operations its passes make of given rows."""

    def __init__(self, config: ModelConfig, lora: LoraConfig | None, *, sharded: bool) -> None:
        """`sharded`: FSDP gathers all weights in the compute dtype; else they keep their own.

        `lora`: None for a model without adapters, whose weights are all trained.
        """
        self._dtype = getattr(torch, config.dtype)
        model = _one_layer(config, lora)
        self._mixed = not sharded and any(p.dtype != self._dtype for p in model.parameters())
        self._stream = torch.float32 if self._mixed and lora is None else self._dtype
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        _lose_memory(model, self._mode, self._dtype if sharded else None)
        self._policy = Policy(model, 0, self._dtype)
        self._passes: dict[tuple[Any, ...], tuple[Operation, ...]] = {}

    def reading(self, rows: Rows, adapters: bool) -> tuple[Operation, ...]:
        """A pass without gradient; `adapters` on or off."""
        key = (rows, adapters)
        if key not in self._passes:
            self._policy.model.eval()
            off = nullcontext() if adapters else self._policy.without_adapters()
            with torch.no_grad(), off:
                self._passes[key] = self._record(rows)[0]
        return self._passes[key]

    def training(self, rows: Rows) -> tuple[tuple[Operation, ...], tuple[Operation, ...]]:
        """A forward pass, and the backward pass, in which checkpointed layers run again."""
        forward, backward = (rows, "forward"), (rows, "backward")
        if forward not in self._passes:
            self._policy.model.train()
            self._passes[forward], self._passes[backward] = self._record(rows, backward=True)
            self._policy.model.zero_grad(set_to_none=True)
        return self._passes[forward], self._passes[backward]

    def _record(
        self, rows: Rows, backward: bool = False
    ) -> tuple[tuple[Operation, ...], tuple[Operation, ...]]:
        core = self._policy.core
        text, layer = core.config.get_text_config(), decoder_layers(core)[0]
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        with self._mode, torch.autocast("cpu", self._dtype, enabled=self._mixed):
            shape = rows.count, rows.width
            states = torch.empty(*shape, text.hidden_size, dtype=self._stream)
            states.requires_grad_(backward)
            angles = torch.empty(1, rows.width, width, dtype=self._stream)
            mask = torch.empty(rows.count, 1, rows.width, rows.width, dtype=torch.bool)
            with Recorder() as forward:
                out = layer(
                    states,
                    attention_mask=mask if rows.masked else None,
                    position_embeddings=(angles, angles),
                )
                out = out if isinstance(out, Tensor) else out[0]
            with Recorder() as back:
                if backward:
                    out.backward(torch.empty_like(out))
        return tuple(forward.found), tuple(back.found)


def _one_layer(config: ModelConfig, lora: LoraConfig | None) -> Any:
    """The recipe's model with one layer, as training prepares it, on the meta device."""
    text: Any = copy.deepcopy(load_model_config(config).get_text_config())
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    dtype = torch.float32 if lora is None else getattr(torch, config.dtype)
    with torch.device("meta"):
        core = AutoModelForCausalLM.from_config(
            text, dtype=dtype, attn_implementation=attention(config)
        )
        recompute_activations(core, config.gradient_checkpointing)
        model = core if lora is None else add_adapters(core, lora)
    if config.gradient_checkpointing:
        checkpoint_activations(core)
    return model


def _lose_memory(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> None:
    """CPU tensors without memory in place of meta ones, since autocast knows no meta device.

    Parameters become `dtype`, if it is given.
    """
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    made = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                    module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
