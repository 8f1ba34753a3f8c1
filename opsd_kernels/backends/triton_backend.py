"""The GPU backend: Triton kernels for rows of logits, cuBLAS for matrix products, fp32 sums.

`blocked` stores a block's logits and overwrites them with their gradient. `tiled` does so for one
slice of the vocabulary at a time and multiplies the slice again in every pass. `streaming`
multiplies tiles of logits inside its kernels in every pass, and stores only the gradient, one slice
of the vocabulary at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends import two_pass
from opsd_kernels.backends.largest import Largest, merged, topk_of
from opsd_kernels.backends.passes import BlockedPass, Gradient, Layout
from opsd_kernels.backends.triton_columns import ColumnTiles
from opsd_kernels.backends.triton_config import device_of, resident_blocks
from opsd_kernels.backends.triton_differences_launch import DifferenceTiles
from opsd_kernels.backends.triton_largest import largest_logits, without_epilogue
from opsd_kernels.backends.triton_launch import FusedTiles, Source
from opsd_kernels.backends.triton_math import FP16_BOOST
from opsd_kernels.backends.triton_rows_launch import StoredTiles
from opsd_kernels.backends.triton_slices import LogitSlice, multiply
from opsd_kernels.backends.triton_targets import add_target_sums, store_entries, target_logits
from opsd_kernels.layouts import padded_columns
from opsd_kernels.plan import Plan
from opsd_kernels.problem import DivergenceProblem, GradsNeeded, Head, Result, TopkProblem

_Tiles = FusedTiles | StoredTiles | ColumnTiles | DifferenceTiles


class _Pass(BlockedPass[_Tiles]):
    """Makes the tiles of a schedule, and the products that turn dz into gradients."""

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self.slices: dict[tuple[int, int], LogitSlice] = {}  # by first column and rows

    def tiles(self, heads: list[Head], block: slice, shared: bool, again: bool) -> _Tiles:
        vocab, streaming = heads[0].weight.shape[0], self.plan.schedule == "streaming"
        hidden = self.operands(heads, block, stacked=shared and not streaming)
        if streaming:
            sources = [
                Source(h, head.weight, head.bias, head.softcap, head.temperature, head.class_weight)
                for h, head in zip(hidden, heads, strict=True)
            ]
            return FusedTiles(sources, shared)
        width, size = self.plan.slice_columns, len(hidden[0])
        slices = [slice(i, min(i + width, vocab)) for i in range(0, vocab, width)]
        # One product reads a shared head once for both models.
        operands = hidden
        if shared:
            operands = [self.buffer("hidden", 2 * size, hidden[0].shape[1], hidden[0].dtype)]
        if self.plan.schedule == "tiled":
            parts = [self.cut(heads, size, shared, columns) for columns in slices]
            return ColumnTiles(parts, operands, hidden[0], self.buffer)
        multiplied = functools.partial(self.logits, heads, operands, hidden[0], shared)
        if self.plan.precision == "fp32":
            return multiplied(slices[0])
        codes = self.buffer("differences", 2 * size, padded_columns(vocab), torch.float16)
        return DifferenceTiles(
            multiplied, slices, codes.unflatten(0, (2, size)), hidden[0], heads[0],
        )  # fmt: skip

    def logits(
        self,
        heads: list[Head],
        operands: list[Tensor],
        hidden: Tensor,
        shared: bool,
        columns: slice,
    ) -> StoredTiles:
        """Multiply a slice of the vocabulary's logits into the buffer that all slices share."""
        part = self.cut(heads, len(hidden), shared, columns)
        part.multiply(operands)
        return StoredTiles(part.logits, part.heads, hidden)

    def cut(self, heads: list[Head], size: int, shared: bool, columns: slice) -> LogitSlice:
        """The slice of a block of `size` rows, made once."""
        key = columns.start, size
        if key not in self.slices:
            width = padded_columns(self.plan.slice_columns)
            buffer = self.buffer("logits", len(heads) * size, width)
            self.slices[key] = LogitSlice(heads, columns, buffer, shared)
        return self.slices[key]

    def operands(self, heads: list[Head], block: slice, stacked: bool = False) -> list[Tensor]:
        """Each head's hidden states of the block; with `stacked`, adjacent in one buffer."""
        size = block.stop - block.start
        if self.kept is None and not stacked:
            return [head.hidden[block] for head in heads]
        shapes = [(size, head.hidden.shape[1], head.hidden.dtype) for head in heads]
        if stacked:
            outs = self.buffer("hidden", 2 * size, *shapes[0][1:]).split(size)
        else:
            outs = [self.buffer(f"hidden {i}", *shape) for i, shape in enumerate(shapes)]
        for out, head in zip(outs, heads, strict=True):
            if self.kept is None:
                out.copy_(head.hidden[block])
            else:
                torch.index_select(head.hidden, 0, self.kept[block], out=out)
        return list(outs)

    def largest(self, head: Head, k: int, block: slice) -> Largest:
        """The block's k largest logits, from one slice of the vocabulary after the other."""
        hidden, width = self.operands([head], block), self.plan.slice_columns
        z = self.buffer("logits", len(hidden[0]), padded_columns(width))
        slices = functools.partial(self.cut, [without_epilogue(head)], len(z), False)
        vocab, found = len(head.weight), None
        for first in range(0, vocab, width):
            part = slices(slice(first, min(first + width, vocab)))
            part.multiply(hidden)
            made = largest_logits(z, part, head, k)
            found = made if found is None else merged([found, made], k)
        assert found is not None  # a head has rows
        return found

    @property
    def resident(self) -> bool:
        if self.plan.schedule != "blocked" or self.plan.precision != "fp32":
            return False
        if self.group is not None or not self.needed.any:
            return False
        hidden = self.head.hidden
        device = device_of(hidden.device.index if hidden.is_cuda else None)
        columns = padded_columns(self.head.weight.shape[0])
        # The programs of a row wait for each other, so all of them must run at once.
        blocks = resident_blocks(columns, device)
        return columns <= device.processors * blocks.programs * blocks.columns

    @property
    def joined(self) -> Callable[..., Tensor] | None:
        frozen = self.needed.hidden and not (self.needed.weight or self.needed.bias)
        return self._joined if self.plan.schedule == "tiled" and frozen else None

    def _joined(
        self,
        block: slice,
        tiles: ColumnTiles,
        layout: Layout,
        merged: Tensor,
        center: Tensor,
        p: DivergenceProblem,
        scale: Tensor | None,
    ) -> Tensor:
        """(2, rows) value and sum of shares, from the logits that also make the gradient.

        dz = (1 - beta) s (K - q), and K is known only at the end. So one product of
        [s (q - center); s] with the head makes both terms of dh. K - center is small where
        q - center is, so rounding s separately from its share costs nothing.
        """
        size, depth = tiles.hidden.shape[0], self.head.weight.shape[1]
        dh = self.buffer("dh 0", 2 * size, depth)

        def add(part: LogitSlice) -> None:
            multiply(dh, part.stacked, part.heads[0].weight, add=part.columns.start > 0)

        sums = tiles.shares(layout, merged, center, p.beta, add)
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        share, chance = dh.split(size)
        half = tiles.hidden.dtype == torch.float16  # shares are stored times FP16_BOOST
        rate = 1.0 - p.beta if half else (1.0 - p.beta) / p.student.temperature
        factor = rate * (1.0 if scale is None else scale[:, None])
        total = sums[1, :, None] * (FP16_BOOST.value if half else 1.0)
        grad = chance.mul_(total).sub_(share).mul_(factor)
        rows = block if self.kept is None else self.kept[block]
        assert self.grad_hidden is not None  # `joined` says so
        self.grad_hidden[rows] = grad.to(self.grad_hidden.dtype)
        return sums

    def result(self, stats: Tensor) -> Result:
        """fp16 inputs: apply what `stored_grad_scale` left out, 1 / (FP16_BOOST * temperature)."""
        if self.head.hidden.dtype == torch.float16:
            for grad in (self.grad_hidden, self.grad_entropy, self.grad_weight, self.grad_bias):
                if grad is not None:
                    grad.div_(FP16_BOOST.value * self.head.temperature)
        return super().result(stats)

    def gradients(self, block: slice, tiles: _Tiles, gradient: Gradient) -> None:
        weight, h = self.head.weight, tiles.hidden
        size, (vocab, depth) = len(h), weight.shape
        width = vocab if self.plan.schedule == "blocked" else self.plan.slice_columns
        # Which dz makes which gradient of the hidden states.
        grads = enumerate((self.grad_hidden, self.grad_entropy))
        pairs = [(i, grad) for i, grad in grads if grad is not None]
        sums = {i: self._room_for_dh(i, size, depth) for i, _ in pairs}
        dz = self._room_for_dz(tiles, width)
        for first in range(0, vocab, width):
            columns = slice(first, min(first + width, vocab))
            gradient(columns, dz)
            cut = [x[:, : columns.stop - first] for x in dz]
            for i, total in sums.items():
                multiply(total, cut[i], weight[columns], add=first > 0)
            if self.grad_weight is not None:
                multiply(self.grad_weight[columns], cut[0].t(), h, add=block.start > 0)
            if self.grad_bias is not None:
                self.grad_bias[columns] += cut[0].sum(0, dtype=torch.float32)
        rows = block if self.kept is None else self.kept[block]
        for i, grad in pairs:
            grad[rows] = sums[i].to(grad.dtype)

    def target_logits(self, tiles: _Tiles, rows: Tensor | slice) -> Tensor:
        return target_logits(self.head, tiles.hidden, self.known_ids(rows))

    def store_entries(self, dz: Tensor, ids: Tensor, values: Tensor) -> None:
        if dz.dtype == torch.float16:  # `result` divides by both
            values = values * (FP16_BOOST.value * self.head.temperature)
        store_entries(dz, ids, values)

    def _room_for_dh(self, index: int, size: int, depth: int) -> Tensor:
        """Buffer for fp32 sums; a slice's logits, no longer needed once they are differences."""
        if self.plan.precision == "difference" and 2 * self.plan.slice_columns >= depth:
            logits = self.buffer("logits", 2 * size, padded_columns(self.plan.slice_columns))
            return logits.flatten()[: size * depth].view(size, depth)
        return self.buffer(f"dh {index}", size, depth)

    def _room_for_dz(self, tiles: _Tiles, width: int) -> list[Tensor]:
        """Buffers for a slice's dz, which overwrites stored logits, and for the entropy's own."""
        size, dtype = tiles.hidden.shape[0], tiles.hidden.dtype
        width = padded_columns(width)
        if isinstance(tiles, FusedTiles):
            dz = [self.buffer("dz 0", size, width, dtype)]
        elif isinstance(tiles, DifferenceTiles):
            dz = [tiles.dz(dtype)]
        else:
            dz = [self.buffer("logits", size, width).view(dtype)[:, :width]]
        return [*dz, self.buffer("dz 1", size, width, dtype)] if self.needed.entropy else dz


def topk(p: TopkProblem, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, k), ids (N, k), lse (N,)) of the k largest logits."""
    run = _Pass(p.head, plan, p.keep, GradsNeeded(), p.execution.group_name, None)
    return topk_of(run, p, (run.largest(p.head, p.k, block) for block in run.blocks()))


__all__ = ["add_target_sums", "divergence", "logprob", "topk"]

divergence = functools.partial(two_pass.divergence, _Pass)
logprob = functools.partial(two_pass.logprob, _Pass)
