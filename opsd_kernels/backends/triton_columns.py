"""Tiles of the schedule `tiled`: a block's logits, one slice of the vocabulary at a time.

Every pass multiplies each slice's logits again into one small buffer and runs the row kernels on
it. The statistics of slices are merged like those of spans.

A call visits hundreds of slices, each for about 200 us on an H100, so the host must not be slower:
whatever a launch takes lies where it lay for the block before, and the launch is prepared once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends.passes import Layout
from opsd_kernels.backends.triton_launch import PreparedLaunch, merge, summed
from opsd_kernels.backends.triton_slices import LogitSlice


class ColumnTiles:
    """A block of rows whose logits are multiplied slice by slice into memory that slices share."""

    def __init__(
        self,
        slices: list[LogitSlice],
        operands: list[Tensor],  # of `LogitSlice.multiply`
        hidden: Tensor,  # (rows, D) of the student
        buffer: Callable[..., Tensor],  # `BlockedPass.buffer`
    ) -> None:
        self.slices, self.operands, self.hidden, self.buffer = slices, operands, hidden, buffer
        self.rows = len(hidden)
        self.copies: dict[str, Tensor] = {}  # of this block, by name

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Fill `out` (K, rows), a view of any row stride, with the statistics of this block."""
        label, parts, first = self._fixed_or_none("label", label), self._spans(layout.count), 0
        for part in self.slices:
            prepare = functools.partial(
                part.tiles.statistics_launch, layout, label, offset + part.columns.start, parts,
                first,
            )  # fmt: skip
            self._visit("statistics", part, prepare)
            first += part.tiles.splits
        merge(parts, out, layout, group)

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2 or 3, rows): value, sum of shares and, with a clip, the value without it."""
        merged, parts, first = self._fixed("merged", merged), self._spans(2 + (clip is not None)), 0
        for part in self.slices:
            prepare = functools.partial(
                part.tiles.sums_launch, layout, merged, beta, clip, parts, first
            )
            self._visit("sums", part, prepare)
            first += part.tiles.splits
        return summed(parts, group)

    def shares(
        self,
        layout: Layout,
        merged: Tensor,
        center: Tensor,
        beta: float,
        use: Callable[[LogitSlice], None],
    ) -> Tensor:
        """(2, rows) value and sum of centered shares of the JSD.

        Calls `use` with each slice, whose `stacked` are then [shares; s].
        """
        merged, center = self._fixed("merged", merged), self._fixed("center", center)
        sums = self._parts(len(self.slices), 2)
        for part, out in zip(self.slices, sums.unbind(), strict=True):
            prepare = functools.partial(part.tiles.shares_launch, layout, merged, center, beta, out)
            self._visit("shares", part, prepare)
            use(part)
        return sums.sum(0)

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
        part = self._slice(columns)
        rows = self._fixed("merged", merged), self._fixed("totals", totals)
        prepare = functools.partial(
            part.tiles.divergence_gradient_launch, layout, *rows,
            self._fixed_or_none("scale", scale), beta, clip, out,
        )  # fmt: skip
        self._visit("gradient", part, prepare)

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
        part = self._slice(columns)
        scale, entropy_scale = scales
        both = (
            self._fixed_or_none("scale", scale),
            self._fixed_or_none("entropy scale", entropy_scale),
        )
        prepare = functools.partial(
            part.tiles.logprob_gradient_launch, self._fixed("label", label),
            self._fixed("merged", merged), self._fixed_or_none("entropy", entropy), both,
            self._fixed_or_none("rates", rates), uniform, offset + columns.start, outs,
        )  # fmt: skip
        self._visit("gradient", part, prepare)

    def _slice(self, columns: slice) -> LogitSlice:
        index: int = columns.start // self.slices[0].count
        return self.slices[index]

    def _visit(self, name: str, part: LogitSlice, prepare: Callable[[], PreparedLaunch]) -> None:
        """Multiply a slice's logits and launch a pass over them, prepared by the first block."""
        part.multiply(self.operands)
        if name not in part.launches:
            part.launches[name] = prepare()
        part.launches[name]()

    def _fixed(self, name: str, values: Tensor) -> Tensor:
        """The block's values, copied once to where those of every block lie."""
        if name not in self.copies:
            room = self.buffer(name, self.rows, values.numel() // self.rows, values.dtype)
            self.copies[name] = room.view(values.shape).copy_(values)
        return self.copies[name]

    def _fixed_or_none(self, name: str, values: Tensor | None) -> Tensor | None:
        return None if values is None else self._fixed(name, values)

    def _spans(self, count: int) -> Tensor:
        """(count, spans of all slices, rows)."""
        return self._parts(count, sum(part.tiles.splits for part in self.slices))

    def _parts(self, first: int, second: int) -> Tensor:
        """(first, second, rows) in a buffer for every pass: the statistics, made first, need most.

        A smaller block may have more spans, at most one for each tile.
        """
        most = max(second, sum(part.tiles.tiles for part in self.slices))
        room = self.buffer("parts", self.rows, first * most).flatten()
        return room[: first * second * self.rows].view(first, second, self.rows)
