"""Launches the Triton kernels over rows of logits that a GEMM left in memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends import triton_resident, triton_row_gradients, triton_rows
from opsd_kernels.backends.passes import JSD, Layout
from opsd_kernels.backends.triton_config import device_of, resident_blocks, row_blocks, spans
from opsd_kernels.backends.triton_launch import PreparedLaunch, merge, summed
from opsd_kernels.backends.triton_math import Epilogue
from opsd_kernels.problem import Head

# Least MAX_PARTS of the resident kernel: one compilation serves most vocabularies.
_MIN_MAX_PARTS = 64


class StoredTiles:
    """A block's logits in memory: (heads, rows, padded) fp32, -inf beyond the vocabulary."""

    def __init__(self, logits: Tensor, heads: list[Head], hidden: Tensor) -> None:
        self.logits, self.hidden = logits, hidden
        self.rows, self.padded = logits.shape[1:]
        self.cols = heads[0].weight.shape[0]
        self.class_weight = heads[0].class_weight
        self.device = device_of(logits.device.index if logits.is_cuda else None)
        # From the row stride, so that the last, narrower slice runs the same kernel as the others.
        self.blocks = row_blocks(logits.stride(1), self.device)
        # BLOCK_V columns each; a program walks `span` of them.
        self.tiles = -(-self.padded // self.blocks.columns)
        self.span, self.splits = spans(self.rows, self.padded, 1, self.blocks.columns, self.device)
        epilogues = [Epilogue(head.bias, head.softcap, 1.0 / head.temperature) for head in heads]
        self.sources = [*logits, *epilogues]
        self.flags = {
            "BLOCK_V": self.blocks.columns, "num_warps": self.blocks.warps, "num_stages": 1,
            "enable_fp_fusion": True,
        }  # fmt: skip

    def dz(self, dtype: torch.dtype, head: int = 0) -> Tensor:
        """(rows, padded) view of a head's logits as `dtype`, to be overwritten."""
        return self.logits[head].view(dtype)[:, : self.padded]

    def stacked(self) -> Tensor:
        """(heads * rows, padded): `dz` of each head in the input dtype, one below the other."""
        dtype = self.hidden.dtype
        return self.logits.flatten(0, 1).view(dtype)[:, : self.padded]

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Fill `out` (K, rows), a view of any row stride, with the statistics of this block."""
        parts = self._parts(layout.count)
        self.statistics_launch(layout, label, offset, parts)()
        merge(parts, out, layout, group)

    def statistics_launch(
        self, layout: Layout, label: Tensor | None, offset: int, parts: Tensor, first: int = 0
    ) -> PreparedLaunch:
        """Statistics of these logits' spans into `parts` (K, spans, rows) from span `first` on."""
        arguments = (
            label if layout.label else None, parts[:, first:], self.rows, self.cols, self.padded,
            self.logits.stride(1), offset, self.span, parts.shape[1],
        )  # fmt: skip
        flags = {**self.flags, "LANES": self.blocks.lanes, "ENTROPY": layout.entropy}
        if layout.heads == 2:
            return PreparedLaunch(
                triton_rows.row_statistics_pair, self.rows * self.splits,
                *self.sources, *arguments, **flags, KIND=layout.kind,
            )  # fmt: skip
        return PreparedLaunch(
            triton_rows.row_statistics, self.rows * self.splits,
            *self.sources, self.class_weight, *arguments, **flags, SMOOTHED=layout.smoothed,
            PREDICTED=layout.predicted,
        )  # fmt: skip

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2 or 3, rows): value, sum of shares and, with a clip, the value without it."""
        parts = self._parts(2 if clip is None else 3)
        self.sums_launch(layout, merged, beta, clip, parts)()
        return summed(parts, group)

    def sums_launch(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        parts: Tensor,
        first: int = 0,
    ) -> PreparedLaunch:
        """`sums` of these logits' spans into `parts` (2 or 3, spans, rows) from `first` on."""
        return PreparedLaunch(
            triton_rows.row_divergence_sums, self.rows * self.splits,
            *self.sources, merged, parts[:, first:], self.rows, self.cols, self.padded,
            self.logits.stride(1), merged.stride(0), beta, 1.0 - beta, clip, self.span,
            parts.shape[1], **self.flags, LANES=self.blocks.lanes,
            HEAD_STATISTICS=len(layout.names), KIND=layout.kind,
        )  # fmt: skip

    def _parts(self, count: int) -> Tensor:
        return self.logits.new_empty(count, self.splits, self.rows)

    def shares_launch(
        self, layout: Layout, merged: Tensor, center: Tensor, beta: float, out: Tensor
    ) -> PreparedLaunch:
        """Value of the JSD and sum of the centered shares s (log(m/s) - center) into `out`.

        `out` is (2, rows). The shares overwrite the student's logits and s the teacher's, both
        multiplied by the softcap's slope.
        """
        dz = [self.dz(self.hidden.dtype, head) for head in range(2)]
        return PreparedLaunch(
            triton_row_gradients.row_jsd_shares, self.rows,
            *self.sources, merged, center, out, *dz, self.rows, self.cols, self.padded,
            self.logits.stride(1), dz[0].stride(0), merged.stride(0), beta,
            1.0 - beta, **self.flags, LANES=self.blocks.lanes, HEAD_STATISTICS=len(layout.names),
        )  # fmt: skip

    def divergence_gradient(
        self,
        layout: Layout,
        merged: Tensor,
        totals: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        columns: slice,
        out: Tensor,  # (rows, padded), `dz` of these logits
    ) -> None:
        self.divergence_gradient_launch(layout, merged, totals, scale, beta, clip, out)()

    def divergence_gradient_launch(
        self,
        layout: Layout,
        merged: Tensor,
        totals: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        out: Tensor,
    ) -> PreparedLaunch:
        return PreparedLaunch(
            triton_row_gradients.row_divergence_gradient, self.rows,
            *self.sources, merged, totals, scale, out, self.cols, self.padded,
            self.logits.stride(1), out.stride(0), merged.stride(0), beta, 1.0 - beta,
            clip, **self.flags, HEAD_STATISTICS=len(layout.names), KIND=layout.kind,
        )  # fmt: skip

    def resident(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        sums: Tensor,
        beta: float,
        scale: Tensor | None,
    ) -> None:
        """Gradient over the student's logits, a JSD's value and sum of shares into `sums`.

        Statistics into `out` if the value or the caller's statistics are made of them.
        """
        blocks = resident_blocks(self.padded, self.device)
        count = -(-self.padded // blocks.columns)
        max_parts = max(_MIN_MAX_PARTS, 1 << (count - 1).bit_length())
        is_jsd = layout.kind == JSD
        stored = not is_jsd or layout.entropy or layout.label
        parts = self.logits.new_empty(layout.count, count, self.rows) if stored else None
        shape = self.rows, triton_resident.SLOTS, max_parts
        exchange = torch.full(
            shape, triton_resident.EMPTY, dtype=torch.int32, device=self.logits.device
        )
        dz = self.dz(self.hidden.dtype)
        teams = min(self.rows, blocks.programs * self.device.processors // count)
        fast = dz.dtype != torch.float32 and (not is_jsd or 0.1 <= beta <= 0.9)
        triton_resident.resident_divergence[(teams * count,)](
            *self.sources, label if layout.label else None, parts, sums if is_jsd else None,
            exchange, scale, dz, self.rows, self.cols, self.padded, self.logits.stride(1),
            dz.stride(0), sums.stride(0), offset, beta, 1.0 - beta, count, BLOCK_V=blocks.columns,
            MAX_PARTS=max_parts, ENTROPY=layout.entropy, KIND=layout.kind, FAST=fast,
            num_warps=blocks.warps, num_stages=1, enable_fp_fusion=True, **blocks.options,
        )  # fmt: skip
        if parts is not None:
            merge(parts, out, layout, None)

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
        outs: list[Tensor],  # (rows, padded): `dz`, and another for the entropy's own gradient
    ) -> None:
        self.logprob_gradient_launch(label, merged, entropy, scales, rates, uniform, offset, outs)()

    def logprob_gradient_launch(
        self,
        label: Tensor,
        merged: Tensor,
        entropy: Tensor | None,
        scales: tuple[Tensor | None, Tensor | None],
        rates: Tensor | None,
        uniform: float,
        offset: int,
        outs: list[Tensor],
    ) -> PreparedLaunch:
        own = outs[1] if len(outs) == 2 else None
        return PreparedLaunch(
            triton_row_gradients.row_logprob_gradient, self.rows,
            *self.sources, self.class_weight, label, merged, rates, entropy, *scales, outs[0], own,
            self.rows, self.cols, self.padded, self.logits.stride(1), outs[0].stride(0),
            outs[0].stride(0) if own is None else own.stride(0), merged.stride(0), offset,
            uniform, **self.flags,
        )  # fmt: skip
