"""A KV cache that grows in place and lets go of finished sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """A prefilled layer with room for the tokens to come: nothing is copied to grow."""

    def __init__(
        self, prefilled: DynamicLayer, rows: Tensor, room: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype, self.device = dtype, prefilled.device
        self.is_initialized = True
        self._keys = _preallocated(prefilled.keys, rows, room, dtype)
        self._values = _preallocated(prefilled.values, rows, room, dtype)
        self._show(len(rows), prefilled.get_seq_length())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, start = self.keys.shape[0], self.keys.shape[-2]
        self._show(rows, start + key_states.shape[-2])
        self.keys[..., start:, :] = key_states
        self.values[..., start:, :] = value_states
        return self.keys, self.values

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Row movers[i] takes the place of row holes[i]; what lies behind `rows` is given up."""
        length = self.keys.shape[-2]
        for buffer in (self._keys, self._values):
            buffer[holes, :, :length] = buffer[movers, :, :length]
        self._show(rows, length)

    def _show(self, rows: int, length: int) -> None:
        self.keys = self._keys[:rows, :, :length]
        self.values = self._values[:rows, :, :length]


def preallocate(cache: DynamicCache, rows: Tensor, room: int, dtype: torch.dtype) -> None:
    """Row i of the prefilled cache becomes a copy of rows[i], with room for `room` more tokens."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = PreallocatedLayer(layer, rows, room, dtype)
        else:  # sliding windows and linear attention stay small
            layer.reorder_cache(rows)


def drop_rows(
    cache: DynamicCache, count: int, dropped: list[int], device: torch.device
) -> list[int]:
    """Take `dropped` out of `count` rows; returns which old row each remaining row was."""
    left = count - len(dropped)
    kept = list(range(left))
    holes = [row for row in dropped if row < left]
    movers = sorted(set(range(left, count)) - set(dropped))
    for hole, mover in zip(holes, movers, strict=True):
        kept[hole] = mover
    to, source, rows = (
        torch.tensor(x, dtype=torch.long, device=device) for x in (holes, movers, kept)
    )
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            layer.keep(left, to, source)
        else:
            layer.reorder_cache(rows)
    return kept


def _preallocated(states: Tensor, rows: Tensor, room: int, dtype: torch.dtype) -> Tensor:
    _, heads, length, width = states.shape
    buffer = states.new_empty((len(rows), heads, length + room, width), dtype=dtype)
    buffer[:, :, :length] = states[rows]
    return buffer
