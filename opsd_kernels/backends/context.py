"""What one call works on and fills, whichever backend runs it."""

from __future__ import annotations

import torch
import torch.distributed as dist

# Its functions' defaults hold the group there is when it is first imported, and an operator's first
# call imports it; gloo's threads would outlive destroy_process_group and could abort Python's end.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from opsd_kernels.plan import Plan
from opsd_kernels.problem import GradsNeeded, Head, Result, kept_dtype, stat_dtype

# Slices of the head's gradient that pass through the input dtype before fp32 accumulation, and of
# dz that a product may copy.
_SLICE_BYTES = 8 * 2**20


class LossContext:
    """Rows to compute, scales, the vocabulary's shard, and the outputs.

    Outputs are zero until filled but for the head's gradient, which the first block makes.
    """

    def __init__(
        self,
        head: Head,
        plan: Plan,
        keep: Tensor | None,
        wanted: GradsNeeded,
        group_name: str | None,
        row_scale: Tensor | None,
        entropy_scale: Tensor | None = None,
        lse_scale: Tensor | None = None,
    ) -> None:
        hidden, weight = head.hidden, head.weight
        self.head, self.plan, self.wanted = head, plan, wanted
        self.rooms: dict[str, Tensor] = {}  # buffers by name
        self.dtype = stat_dtype(hidden.dtype)
        self.kept = None if keep is None else keep.nonzero().squeeze(-1)  # None: every row
        self.num_kept = hidden.shape[0] if self.kept is None else self.kept.shape[0]
        scales = row_scale, entropy_scale, lse_scale
        (self.row_scale, self.entropy_scale, self.lse_scale), self.scale = _relative(*scales)
        self.value = hidden.new_zeros(hidden.shape[0], dtype=self.dtype)
        self.grad_hidden = _zeros(hidden) if wanted.hidden else None
        self.grad_entropy = _zeros(hidden) if wanted.entropy else None
        self.grad_weight = None
        if wanted.weight:  # the first block overwrites it
            self.grad_weight = weight.new_empty(weight.shape, dtype=self.dtype)
            if self.num_kept == 0:
                self.grad_weight.zero_()
        self.grad_bias = (
            weight.new_zeros(weight.shape[0], dtype=self.dtype) if wanted.bias else None
        )
        self.group, self.offset, self.vocab_size = None, 0, weight.shape[0]
        if group_name is not None:
            self.group = _resolve_process_group(group_name)
            self.offset, self.vocab_size = vocabulary_shard(weight, group_name)[:2]

    def add_products(
        self, rows: Tensor | slice, h: Tensor, dz: list[Tensor], *, first: bool
    ) -> None:
        """What a block's dz, and the entropy's own as a second, give to each gradient."""
        weight = self.head.weight
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = torch.mm(dz[0], weight)
        if self.grad_entropy is not None:
            self.grad_entropy[rows] = torch.mm(dz[1], weight)
        if self.grad_weight is not None:
            self._add_weight(dz[0], h, first)
        if self.grad_bias is not None:
            self.grad_bias += dz[0].sum(0, dtype=self.dtype)

    def _add_weight(self, dz: Tensor, h: Tensor, first: bool) -> None:
        if self.grad_weight.dtype == h.dtype:
            self.grad_weight.addmm_(dz.t(), h, beta=int(not first))
            return
        size = max(1, _SLICE_BYTES // (sum(h.shape) * h.element_size()))
        for total, part in zip(self.grad_weight.split(size), dz.t().split(size), strict=True):
            if first:
                total.copy_(torch.mm(part, h))
            else:
                total += torch.mm(part, h)

    def result(self, stats: Tensor) -> Result:
        for grad in (self.grad_hidden, self.grad_entropy):
            if self.group is not None and grad is not None:
                dist.all_reduce(grad, group=self.group)  # each shard saw its slice of the sum
        return Result(
            value=self.value,
            stats=stats,
            grad_hidden=self.grad_hidden,
            grad_entropy=self.grad_entropy,
            grad_weight=self.grad_weight,
            grad_bias=self.grad_bias,
            scale=self.scale,
        )


def _zeros(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(hidden.shape, dtype=kept_dtype(hidden.dtype))


def vocabulary_shard(weight: Tensor, group_name: str) -> tuple[int, int, int]:
    """(first entry of this rank's shard, size of the whole vocabulary, largest shard)."""
    group = _resolve_process_group(group_name)
    rank = dist.get_rank(group)
    # A tensor on the head's device suits NCCL and gloo; all_gather_object would need numpy.
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
    counts[rank] = weight.shape[0]
    dist.all_reduce(counts, group=group)
    sizes = counts.tolist()
    return sum(sizes[:rank]), sum(sizes), max(sizes)


def same_head(a: Head, b: Head) -> bool:
    """One weight serves both models: self-distillation with a frozen head."""
    x, y = a.weight, b.weight
    same = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
    return same and x.dtype == y.dtype and a.hidden.dtype == b.hidden.dtype


def _relative(*scales: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
    """Scales divided by the largest magnitude of all, contiguous, and that magnitude."""
    given = [scale for scale in scales if scale is not None]
    if not given:
        return list(scales), None
    largest = torch.stack(given).abs().amax() if given[0].numel() else given[0].new_zeros(())
    divisor = torch.where(largest == 0, 1, largest)
    return [None if scale is None else scale / divisor for scale in scales], divisor
