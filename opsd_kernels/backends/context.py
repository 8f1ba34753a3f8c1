"""State of one operator call, shared by all backends: which rows, which scales, which outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

# This module's default arguments hold the default process group of the moment it is imported, and
# the first call of an operator imports it. Imported here, before there is a group: a group kept
# alive keeps gloo's threads past destroy_process_group and can abort Python at exit.
import torch.distributed.nn.functional
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName

from opsd_kernels.plan import Plan
from opsd_kernels.problem import (
    GradsNeeded,
    Head,
    KnownEntries,
    Result,
    kept_dtype,
    stat_dtype,
    weight_grad_dtype,
)

# 16-bit products of the head's gradient are added to its fp32 sum in slices of this size, and a
# product that must copy dz copies no more at a time.
_SLICE_BYTES = 8 * 2**20


class LossContext:
    """Rows to compute, scales, the rank's shard of the vocabulary, and the outputs.

    Outputs start as zeros, except the head's gradient: the first block writes it.
    """

    def __init__(
        self,
        head: Head,
        plan: Plan,
        keep: Tensor | None,  # (N,) bool
        needed: GradsNeeded,
        group_name: str | None,
        row_scale: Tensor | None,  # (N,), as the two below
        entropy_scale: Tensor | None = None,
        lse_scale: Tensor | None = None,
        known: KnownEntries | None = None,
    ) -> None:
        hidden, weight = head.hidden, head.weight
        self.head, self.plan, self.needed = head, plan, needed
        self.buffers: dict[str, Tensor] = {}  # by name
        self.dtype = stat_dtype(hidden.dtype)
        self.kept = None if keep is None else keep.nonzero().squeeze(-1)  # None: every row
        self.num_kept = hidden.shape[0] if self.kept is None else self.kept.shape[0]
        self.known = known
        dz = None if known is None else known.dz
        scales: tuple[Tensor | None, ...] = (row_scale, entropy_scale, lse_scale, dz)
        self.scale = None
        if hidden.dtype == torch.float16:
            scales, self.scale = _relative(scales)
        elif any(scale is not None for scale in scales):
            self.scale = hidden.new_ones((), dtype=self.dtype)
        self.row_scale, self.entropy_scale, self.lse_scale, self.known_dz = (
            None if scale is None else scale.contiguous() for scale in scales
        )
        self.value = hidden.new_zeros(hidden.shape[0], dtype=self.dtype)
        self.known_logits: Tensor | None = None  # (N, K)
        if known is not None and known.dz is None:
            self.known_logits = self.value.new_zeros(known.ids.shape)
        self.grad_hidden = _zeros(hidden) if needed.hidden else None
        self.grad_entropy = _zeros(hidden) if needed.entropy else None
        self.grad_weight = None
        if needed.weight:  # the first block overwrites it
            self.grad_weight = self.new_grad_weight()
            if self.num_kept == 0:
                self.grad_weight.zero_()
        self.grad_bias = (
            weight.new_zeros(weight.shape[0], dtype=self.dtype) if needed.bias else None
        )
        self.group: dist.ProcessGroup | None = None
        self.offset, self.vocab_size = 0, weight.shape[0]
        if group_name is not None:
            self.group = _resolve_process_group(GroupName(group_name))
            self.offset, self.vocab_size = vocabulary_shard(weight, group_name)[:2]

    def known_ids(self, rows: Tensor | slice, first: int = 0) -> Tensor:
        """(rows, K) columns of some rows' known entries, counted from the shard's `first`."""
        assert self.known is not None
        return self.known.ids[rows] - (self.offset + first)

    def known_entries(self, rows: Tensor | slice, first: int = 0) -> tuple[Tensor, Tensor]:
        """`known_ids`, and the entries' values in the scale of the row scales, both (rows, K)."""
        ids = self.known_ids(rows, first)
        if self.known_dz is None:
            return ids, ids.new_zeros(ids.shape, dtype=self.dtype)
        return ids, self.known_dz[rows]

    def new_grad_weight(self) -> Tensor:
        """(V, D), uninitialized, in the dtype in which the products are added up."""
        return self.head.weight.new_empty(self.head.weight.shape, dtype=self.dtype)

    def add_products(
        self, rows: Tensor | slice, h: Tensor, dz: list[Tensor], *, first: bool
    ) -> None:
        """Add a block's products with dz to the gradients; dz[1], if any, is the entropy's."""
        weight = self.head.weight
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = torch.mm(dz[0], weight)
        if self.grad_entropy is not None:
            self.grad_entropy[rows] = torch.mm(dz[1], weight)
        if self.grad_weight is not None:
            self.add_weight_product(self.grad_weight, dz[0], h, first=first)
        if self.grad_bias is not None:
            self.grad_bias += dz[0].sum(0, dtype=self.dtype)

    def add_weight_product(
        self, grad_weight: Tensor, dz: Tensor, h: Tensor, *, first: bool
    ) -> None:
        """grad_weight (V, D) += dz.T @ h; the first block's product overwrites it."""
        if grad_weight.dtype == h.dtype:
            grad_weight.addmm_(dz.t(), h, beta=int(not first))
            return
        size = max(1, _SLICE_BYTES // (sum(h.shape) * h.element_size()))
        for out, part in zip(grad_weight.split(size), dz.t().split(size), strict=True):
            if first:
                out.copy_(torch.mm(part, h))
            else:
                out += torch.mm(part, h)

    def widened(self, weight: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
        """A head of 16 bits in fp32, `width` of its rows at a time."""
        vocab = weight.shape[0]
        buffer = weight.new_empty(min(width, vocab), weight.shape[1], dtype=self.dtype)
        for first in range(0, vocab, width):
            columns = slice(first, min(first + width, vocab))
            yield columns, buffer[: columns.stop - first].copy_(weight[columns])

    def add_widened_products(
        self, rows: Tensor | slice, h: Tensor, dz: list[Tensor], width: int, *, first: bool
    ) -> None:
        """As `add_products`, for fp32 dz of 16-bit operands: all products are fp32."""
        sums = [
            (grad, z, grad.new_zeros(h.shape, dtype=self.dtype))
            for grad, z in zip((self.grad_hidden, self.grad_entropy), dz, strict=False)
            if grad is not None
        ]
        h = h.to(self.dtype)
        for columns, part in self.widened(self.head.weight, width):
            for _, z, dh in sums:
                dh.addmm_(z[:, columns], part)
            if self.grad_weight is not None:
                self.grad_weight[columns].addmm_(dz[0][:, columns].t(), h, beta=int(not first))
        for grad, _, dh in sums:
            grad[rows] = dh.to(grad.dtype)
        if self.grad_bias is not None:
            self.grad_bias += dz[0].sum(0)

    def result(self, stats: Tensor) -> Result:
        """What the operator returns: value and `stats` per token, and the gradients made so far."""
        for part in (self.grad_hidden, self.grad_entropy, self.known_logits):
            if self.group is not None and part is not None:
                dist.all_reduce(part, group=self.group)  # each shard has its part of the sum
        grad_weight = self.grad_weight
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_grad_dtype(self.head.weight))
        return Result(
            value=self.value,
            stats=stats,
            grad_hidden=self.grad_hidden,
            grad_entropy=self.grad_entropy,
            grad_weight=grad_weight,
            grad_bias=self.grad_bias,
            scale=self.scale,
            known_logits=self.known_logits,
        )


def _zeros(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(hidden.shape, dtype=kept_dtype(hidden.dtype))


def vocabulary_shard(weight: Tensor, group_name: str) -> tuple[int, int, int]:
    """(first entry of this rank's shard, size of the whole vocabulary, size of the largest shard).

    Every rank of the group must call it.
    """
    group = _resolve_process_group(GroupName(group_name))
    rank = dist.get_rank(group)
    # A tensor on the head's device suits NCCL and gloo; all_gather_object would need numpy.
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
    counts[rank] = weight.shape[0]
    dist.all_reduce(counts, group=group)
    sizes = counts.tolist()
    return sum(sizes[:rank]), sum(sizes), max(sizes)


def same_head(a: Head, b: Head) -> bool:
    """Whether both models use one weight, as in self-distillation with a frozen head."""
    x, y = a.weight, b.weight
    same = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
    return same and x.dtype == y.dtype and a.hidden.dtype == b.hidden.dtype


def store_stats(
    stats: Tensor,  # (S, N)
    names: tuple[str, ...],  # of its rows
    tokens: Tensor | slice,
    columns: Mapping[str, Tensor],  # (tokens,) each
) -> None:
    """Write statistics of some tokens into their rows of `stats`."""
    for name, column in columns.items():
        stats[names.index(name), tokens] = column


def _relative(scales: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The scales divided by the largest magnitude among them, and that magnitude."""
    given = [scale for scale in scales if scale is not None]
    if not given:
        return scales, None
    largest = given[0].new_zeros(())
    if given[0].numel():
        largest = torch.stack([scale.abs().amax() for scale in given]).amax()
    divisor = torch.where(largest == 0, 1, largest)
    return tuple(None if scale is None else scale / divisor for scale in scales), divisor
