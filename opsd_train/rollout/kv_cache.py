"""A KV cache that grows in place, and drops the rows of finished sequences."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """A prefilled layer with space for `room` more tokens; DynamicLayer copies itself for each.

    Row i is a copy of row rows[i] of `prefilled`. Keys and values are (rows, heads, tokens, width).
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self, prefilled: DynamicLayer, rows: Tensor, room: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert prefilled.keys is not None and prefilled.values is not None
        self.dtype, self.device = dtype, prefilled.device
        self.is_initialized = True
        self._keys = _preallocated(prefilled.keys, rows, room, dtype)
        self._values = _preallocated(prefilled.values, rows, room, dtype)
        self._show(len(rows), prefilled.get_seq_length())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, new tokens, width) states; returns all keys and values."""
        rows, start = self.keys.shape[0], self.keys.shape[-2]
        self._show(rows, start + key_states.shape[-2])
        self.keys[..., start:, :] = key_states
        self.values[..., start:, :] = value_states
        return self.keys, self.values

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Move row movers[i] to row holes[i], then keep the first `rows` rows."""
        length = self.keys.shape[-2]
        for buffer in (self._keys, self._values):
            buffer[holes, :, :length] = buffer[movers, :, :length]
        self._show(rows, length)

    def _show(self, rows: int, length: int) -> None:
        self.keys = self._keys[:rows, :, :length]
        self.values = self._values[:rows, :, :length]


def preallocate(cache: DynamicCache, rows: Tensor, room: int, dtype: torch.dtype) -> None:
    """Make row i of a prefilled cache a copy of its row rows[i], with room for `room` more tokens.

    `rows`: int64. Layers with a sliding window or linear attention only copy rows.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = PreallocatedLayer(layer, rows, room, dtype)
        else:  # sliding windows and linear attention stay small
            layer.reorder_cache(cast(torch.LongTensor, rows))


def drop_rows(
    cache: DynamicCache, count: int, dropped: list[int], device: torch.device
) -> list[int]:
    """Drop these of the cache's `count` rows; returns the old index of each row that remains.

    Rows from the end fill the holes, so rows change places.
    """
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
            layer.reorder_cache(cast(torch.LongTensor, rows))
    return kept


def _preallocated(states: Tensor, rows: Tensor, room: int, dtype: torch.dtype) -> Tensor:
    _, heads, length, width = states.shape
    buffer = states.new_empty((len(rows), heads, length + room, width), dtype=dtype)
    buffer[:, :, :length] = states[rows]
    return buffer
