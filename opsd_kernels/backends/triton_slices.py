"""A slice of the vocabulary's logits: the products that make it, and the launches over it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.backends.triton_launch import PreparedLaunch
from opsd_kernels.backends.triton_rows_launch import StoredTiles
from opsd_kernels.layouts import padded_columns
from opsd_kernels.problem import Head


class LogitSlice:
    """A slice of a block's logits, in the buffer that all slices and blocks share.

    Views and launches depend on the slice and on the number of rows only, so blocks of one size
    share them: to make them at every visit takes the host longer than the GPU takes for the slice.
    """

    def __init__(
        self,
        heads: list[Head],
        columns: slice,
        buffer: Tensor,  # (heads * rows, columns of the widest slice, padded) fp32
        shared: bool,  # one product of both models' hidden states, stacked
    ) -> None:
        self.heads, self.columns = [_part(head, columns) for head in heads], columns
        self.count = columns.stop - columns.start
        z = buffer[:, : padded_columns(self.count)]
        self.logits = z.unflatten(0, (len(heads), len(z) // len(heads)))
        outs = [z] if shared else list(self.logits)
        self.products = [
            (out[:, : self.count], head.weight.t())
            for out, head in zip(outs, self.heads[: len(outs)], strict=True)
        ]
        self.padding = z[:, self.count :]
        self.launches: dict[str, PreparedLaunch] = {}  # by pass

    @functools.cached_property
    def tiles(self) -> StoredTiles:
        """The logits as row kernels take them, whatever the block."""
        return StoredTiles(self.logits, self.heads, self.heads[0].hidden)

    @functools.cached_property
    def stacked(self) -> Tensor:
        """(heads * rows, columns): what a pass left over the logits, in the input dtype."""
        return self.tiles.stacked()[:, : self.count]

    def multiply(self, operands: list[Tensor]) -> None:
        """Multiply the hidden states of a block, or those of both models stacked."""
        for (out, weight), hidden in zip(self.products, operands, strict=True):
            multiply(out, hidden, weight)
        if self.padding.shape[1]:
            self.padding.fill_(-torch.inf)


def _part(head: Head, columns: slice) -> Head:
    """The rows of a head's weight, bias and class weights in a slice of the vocabulary."""
    vectors = head.bias, head.class_weight
    bias, class_weight = (None if x is None else x[columns] for x in vectors)
    return replace(head, weight=head.weight[columns], bias=bias, class_weight=class_weight)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b with fp32 sums, out fp32."""
    how: dict[str, Any] = {}
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()  # on the CPU under the interpreter
    else:
        how["out_dtype"] = torch.float32
    if add:
        torch.addmm(out, a, b, out=out, **how)
    else:
        torch.mm(a, b, out=out, **how)
