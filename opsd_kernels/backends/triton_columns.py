"""Tiles of the schedule `tiled`: a block's logits, one slice of the vocabulary at a time.

Every pass multiplies each slice's logits again into one small buffer and runs the row kernels on
it. The statistics of slices are merged like those of spans.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends.passes import Layout
from opsd_kernels.backends.triton_launch import merge, summed
from opsd_kernels.backends.triton_rows_launch import StoredTiles


class ColumnTiles:
    """A block of rows; `multiplied(columns)` multiplies a slice of its logits into memory."""

    def __init__(
        self, multiplied: Callable[[slice], StoredTiles], slices: list[slice], hidden: Tensor
    ) -> None:
        self.multiplied, self.slices, self.hidden = multiplied, slices, hidden

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Fill `out` (K, rows), a view of any row stride, with the statistics of this block."""
        parts = [
            self.multiplied(columns).statistics_of_spans(layout, label, offset + columns.start)
            for columns in self.slices
        ]
        merge(torch.cat(parts, 1), out, layout, group)

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2 or 3, rows): value, sum of shares and, with a clip, the value without it."""
        parts = [
            self.multiplied(columns).sums_of_spans(layout, merged, beta, clip)
            for columns in self.slices
        ]
        return summed(torch.cat(parts, 1), group)

    def shares(
        self,
        layout: Layout,
        merged: Tensor,
        center: Tensor,
        beta: float,
        use: Callable[[slice, Tensor], None],
    ) -> Tensor:
        """(2, rows) value and sum of centered shares of the JSD.

        Calls `use(columns, [shares; s])` for each slice: (2 rows, columns) in the input dtype.
        """
        sums = []
        for columns in self.slices:
            tiles = self.multiplied(columns)
            sums.append(tiles.shares(layout, merged, center, beta))
            use(columns, tiles.stacked()[:, : columns.stop - columns.start])
        return functools.reduce(torch.add, sums)

    def divergence_gradient(
        self,
        layout: Layout,
        merged: Tensor,
        totals: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        columns: slice,
        out: Tensor,
    ) -> None:
        tiles = self.multiplied(columns)
        tiles.divergence_gradient(layout, merged, totals, scale, beta, clip, columns, out)

    def logprob_gradient(
        self,
        label: Tensor,
        merged: Tensor,
        entropy: Tensor | None,
        scales: tuple[Tensor | None, Tensor | None],
        rates: Tensor | None,
        uniform: float,
        offset: int,
        columns: slice,
        outs: list[Tensor],
    ) -> None:
        tiles = self.multiplied(columns)
        offset += columns.start
        tiles.logprob_gradient(
            label, merged, entropy, scales, rates, uniform, offset, columns, outs
        )
