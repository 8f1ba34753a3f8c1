"""Both schedules on a GPU: Triton kernels for tiles of logits, cuBLAS for the gradients' products.

`blocked` reads the tiles from logits a GEMM left in memory, `streaming` multiplies them from hidden
states and head in every pass. The gradient of the logits is made one slice of the vocabulary at a
time and multiplied into fp32 sums.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from opsd_kernels.backends import passes
from opsd_kernels.backends.passes import Gradient, Run
from opsd_kernels.backends.triton_launch import Source, Tiles
from opsd_kernels.problem import Head


class _Run(Run):
    """Where the tiles come from, and the products that turn a slice's dz into gradients."""

    def tiles(
        self, heads: list[Head], block: slice, temperature: float, shared: bool, again: bool
    ) -> Tiles:
        hidden = [self.part(head.hidden, block) for head in heads]
        vocab = heads[0].weight.shape[0]
        if self.plan.schedule == "streaming":
            sources = [
                Source(h, head.weight, head.bias, head.softcap)
                for h, head in zip(hidden, heads, strict=True)
            ]
            return Tiles(sources, vocab, temperature, shared)
        size = hidden[0].shape[0]
        logits = self.room("logits", len(heads) * size, vocab)
        if shared:  # one GEMM reads the head once for both models
            _multiply(logits, torch.cat(hidden), heads[0].weight.t(), add=False)
        else:
            for z, h, head in zip(logits.split(size), hidden, heads, strict=True):
                _multiply(z, h, head.weight.t(), add=False)
        sources = [
            Source(z, None, head.bias, head.softcap)
            for z, head in zip(logits.split(size), heads, strict=True)
        ]
        return Tiles(sources, vocab, temperature, False)

    def gradients(self, block: slice, tiles: Tiles, gradient: Gradient) -> None:
        weight, h = self.head.weight, self.part(self.head.hidden, block)
        size = h.shape[0]
        vocab, width = weight.shape[0], self.plan.slice_columns
        # Which dz makes which gradient of the hidden states.
        pairs = [(0, self.grad_hidden), (1, self.grad_entropy)]
        pairs = [(i, grad) for i, grad in pairs if grad is not None]
        count = 2 if self.wanted.entropy else 1
        sums = {i: self.room(f"dh {i}", size, weight.shape[1]).zero_() for i, _ in pairs}
        dz = [self.room(f"dz {i}", size, width, h.dtype) for i in range(count)]
        for first in range(0, vocab, width):
            columns = slice(first, min(first + width, vocab))
            outs = [x[:, : columns.stop - first] for x in dz]
            gradient(columns, outs)
            for i, total in sums.items():
                _multiply(total, outs[i], weight[columns], add=True)
            if self.grad_weight is not None:
                _multiply(self.grad_weight[columns], outs[0].t(), h, add=True)
            if self.grad_bias is not None:
                self.grad_bias[columns] += outs[0].sum(0, dtype=torch.float32)
        rows = block if self.kept is None else self.kept[block]
        for i, grad in pairs:
            grad[rows] = sums[i].to(grad.dtype)


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out (+)= a @ b with fp32 sums, out fp32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b, how = a.float(), b.float(), {}  # on the CPU under the interpreter
    else:
        how = {"out_dtype": torch.float32}
    if add:
        torch.addmm(out, a, b, out=out, **how)
    else:
        torch.mm(a, b, out=out, **how)


divergence = functools.partial(passes.divergence, _Run)
logprob = functools.partial(passes.logprob, _Run)
