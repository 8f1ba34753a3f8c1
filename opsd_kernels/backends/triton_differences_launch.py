"""Launches the kernels that keep a pair's logits as 16-bit differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends import triton_differences
from opsd_kernels.backends.passes import Layout
from opsd_kernels.backends.triton_config import device_of, spans
from opsd_kernels.backends.triton_launch import merge, summed
from opsd_kernels.backends.triton_rows_launch import StoredTiles
from opsd_kernels.layouts import DIFFERENCE_TILE
from opsd_kernels.problem import Head

_WARPS = 1  # 16 columns per thread


class DifferenceTiles:
    """A block of rows; `multiplied(columns)` multiplies a slice of its fp32 logits into memory.

    `statistics` turns the logits into differences (2, rows, padded) in fp16, which the other passes
    read and the gradient overwrites.
    """

    def __init__(
        self,
        multiplied: Callable[[slice], StoredTiles],
        slices: list[slice],
        differences: Tensor,
        hidden: Tensor,
        student: Head,
    ) -> None:
        self.multiplied, self.slices, self.student = multiplied, slices, student
        self.differences, self.hidden = differences, hidden
        self.rows, self.padded = differences.shape[1:]
        self.tiles = -(-self.padded // DIFFERENCE_TILE)
        index = differences.device.index if differences.is_cuda else None
        self.span, self.splits = spans(self.rows, self.padded, 1, DIFFERENCE_TILE, device_of(index))
        self.flags = {
            "BLOCK_V": DIFFERENCE_TILE, "num_warps": _WARPS, "num_stages": 1,
            "enable_fp_fusion": True,
        }  # fmt: skip

    def dz(self, dtype: torch.dtype) -> Tensor:
        """(rows, padded) view of `larger`, the first differences, to be overwritten."""
        return self.differences[0].view(dtype)

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Fill `out` (K, rows), a view of any row stride, with the statistics of this block."""
        self.parts = out.new_empty(layout.count, self.tiles, self.rows)
        for columns in self.slices:
            logits = self.multiplied(columns)
            tile, count = columns.start // DIFFERENCE_TILE, -(-logits.padded // DIFFERENCE_TILE)
            triton_differences.difference_statistics[(self.rows * count,)](
                *logits.sources, label if layout.label else None, self.parts, *self.differences,
                self.rows, logits.cols, logits.padded, logits.logits.stride(1),
                self.differences.stride(1), offset + columns.start, tile, self.tiles,
                **self.flags, ENTROPY=layout.entropy, KIND=layout.kind,
            )  # fmt: skip
        merge(self.parts, out, layout, group)

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2, rows): value, and K of the gradient: the mean of log(m / s) or log(s / t) under s.

        K is divided by the sum of the rounded s, which is not exactly 1: for a student that is sure
        of one column the gradient is the difference of that column's term and K.
        """
        parts = merged.new_empty(3, self.splits, self.rows)
        triton_differences.difference_sums[(self.rows * self.splits,)](
            *self.differences, self.parts, merged, parts, self.rows, self.padded,
            self.differences.stride(1), merged.stride(0), beta, 1.0 - beta, self.span,
            self.splits, self.tiles, **self.flags, LANES=32 * _WARPS,
            HEAD_STATISTICS=len(layout.names), KIND=layout.kind,
        )  # fmt: skip
        value, shares, chances = summed(parts, group)
        return torch.stack([value, shares / chances])

    def divergence_gradient(
        self,
        layout: Layout,
        merged: Tensor,
        totals: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        columns: slice,
        out: Tensor,  # (rows, padded), `dz` of these differences
    ) -> None:
        triton_differences.difference_gradient[(self.rows * self.splits,)](
            *self.differences, self.parts, self.student.softcap, 1.0 / self.student.temperature,
            merged, totals, scale, out, self.rows, self.padded, self.differences.stride(1),
            merged.stride(0), beta, 1.0 - beta, self.span, self.tiles, **self.flags,
            HEAD_STATISTICS=len(layout.names), KIND=layout.kind,
        )  # fmt: skip
