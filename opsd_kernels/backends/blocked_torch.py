"""The `blocked` schedule in plain PyTorch, for any device.

A block of rows goes through one GEMM to logits; its rows are folded tile by tile, in cache, into
values and, in place, into the gradient of the logits; one GEMM takes that to the hidden states and
one, when the head is trained, to its weight. Rows that carry no loss never reach a GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from opsd_kernels.backends import row_math
from opsd_kernels.plan import Plan
from opsd_kernels.problem import (
    DIVERGENCE_STATS,
    LOGPROB_STATS,
    DivergenceProblem,
    Head,
    LogprobProblem,
    Result,
    Wanted,
    stat_dtype,
)

# Slices of the head's gradient that pass through the input dtype before fp32 accumulation.
_SLICE_BYTES = 8 * 2**20


def divergence(
    p: DivergenceProblem, plan: Plan, row_scale: Tensor | None, wanted: Wanted
) -> Result:
    """Per-token divergence; gradients of sum(row_scale * value), per row for row_scale None."""
    run = _Run(p.student, plan, p.keep, wanted, p.execution.group_name, row_scale)
    stats = run.stats(len(DIVERGENCE_STATS) if p.with_stats else 0)
    shared = _same_head(p.student, p.teacher)
    logits = run.logits(2 if shared else 1)
    logits_t = logits if shared else run.logits(1, p.teacher.hidden)
    tiles = [run.tile() for _ in range(5)]
    for rows in run.blocks():
        size = rows.shape[0]
        h_s, h_t = p.student.hidden[rows], p.teacher.hidden[rows]
        z_s, z_t = logits[:size], logits_t[size : 2 * size] if shared else logits_t[:size]
        if shared:  # one GEMM reads the head once for both models
            torch.mm(torch.cat([h_s, h_t]), p.student.weight.t(), out=logits[: 2 * size])
        else:
            torch.mm(h_s, p.student.weight.t(), out=z_s)
            torch.mm(h_t, p.teacher.weight.t(), out=z_t)
        for first in range(0, size, plan.tile_rows):
            part = slice(first, first + plan.tile_rows)
            _divergence_tile(p, run, rows[part], z_s[part], z_t[part], tiles, stats)
        run.products(rows, h_s, z_s)
    return run.result(stats)


def _divergence_tile(
    p: DivergenceProblem,
    run: _Run,
    rows: Tensor,
    z_s: Tensor,
    z_t: Tensor,
    tiles: list[Tensor],
    stats: Tensor,
) -> None:
    log_s, log_t, s, t, work = (tile[: rows.shape[0]] for tile in tiles)
    slope = run.slope(rows.shape[0])
    row_math.to_logits_(log_s.copy_(z_s), p.student.bias, p.student.softcap, p.temperature, slope)
    row_math.to_logits_(log_t.copy_(z_t), p.teacher.bias, p.teacher.softcap, p.temperature, None)
    row_math.log_softmax_(log_s, s, run.group)
    row_math.log_softmax_(log_t, t, run.group)
    columns: list[Tensor | None] = []
    if p.with_stats:
        columns += [row_math.entropy(x, y, work, run.group) for x, y in ((log_s, s), (log_t, t))]
        if p.labels is None:
            columns += [None, None]
        else:
            label = p.labels[rows, None]
            columns += [row_math.pick(x, label, run.offset, run.group) for x in (log_s, log_t)]
    value, removed = row_math.divergence_(
        log_s,
        s,
        log_t,
        t,
        work,
        beta=p.beta,
        clip=p.clip,
        want_grad=run.wanted.any,
        group=run.group,
    )
    run.value[rows] = value.squeeze(-1)
    if p.with_stats:
        for row, column in zip(stats, [*columns, removed], strict=True):
            if column is not None:
                row[rows] = column.squeeze(-1)
    if run.wanted.any:
        run.store_gradient(z_s, log_s, slope, run.factor(run.row_scale, rows, p.temperature))


def logprob(
    p: LogprobProblem,
    plan: Plan,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    wanted: Wanted,
) -> Result:
    """Per-token log-probability of the target; gradients as `divergence`, the entropy's beside."""
    run = _Run(p.head, plan, p.keep, wanted, p.execution.group_name, row_scale, entropy_scale)
    stats = run.stats(len(LOGPROB_STATS))
    logits = run.logits(2 if wanted.entropy else 1)
    tiles = [run.tile() for _ in range(3)]
    for rows in run.blocks():
        size = rows.shape[0]
        h = p.head.hidden[rows]
        blocks = [logits[:size], logits[size : 2 * size]] if wanted.entropy else [logits[:size]]
        torch.mm(h, p.head.weight.t(), out=blocks[0])
        for first in range(0, size, plan.tile_rows):
            part = slice(first, first + plan.tile_rows)
            _logprob_tile(p, run, rows[part], [z[part] for z in blocks], tiles, stats)
        run.products(rows, h, *blocks)
    return run.result(stats)


def _logprob_tile(
    p: LogprobProblem,
    run: _Run,
    rows: Tensor,
    blocks: list[Tensor],
    tiles: list[Tensor],
    stats: Tensor,
) -> None:
    log_p, prob, work = (tile[: rows.shape[0]] for tile in tiles)
    slope = run.slope(rows.shape[0])
    row_math.to_logits_(log_p.copy_(blocks[0]), p.head.bias, p.head.softcap, p.temperature, slope)
    lse = row_math.log_softmax_(log_p, prob, run.group)
    target = p.target[rows, None]
    logprob = row_math.pick(log_p, target, run.offset, run.group)
    value = row_math.smooth(log_p, logprob, p.label_smoothing, run.vocab_size, run.group)
    run.value[rows] = value.squeeze(-1)
    stats[0, rows], stats[2, rows] = logprob.squeeze(-1), lse.squeeze(-1)
    if p.with_entropy:
        entropy = row_math.entropy(log_p, prob, work, run.group)
        stats[1, rows] = entropy.squeeze(-1)
        row_math.entropy_grad_(work, prob, entropy)
    if not run.wanted.any:
        return
    grad = row_math.logprob_grad_(prob, target, p.label_smoothing, run.vocab_size, run.offset)
    factor = run.factor(run.row_scale, rows, p.temperature)
    if run.entropy_scale is not None:  # both upstreams are known: one product serves both
        work.mul_(run.factor(run.entropy_scale, rows, p.temperature))
        grad.mul_(factor).add_(work)
        factor = 1.0
    elif run.wanted.entropy:
        run.store_gradient(blocks[1], work, slope, 1.0 / p.temperature)
    run.store_gradient(blocks[0], grad, slope, factor)


class _Run:
    """What one call allocates and fills: buffers by the plan, values and gradients by block."""

    def __init__(
        self,
        head: Head,
        plan: Plan,
        keep: Tensor | None,
        wanted: Wanted,
        group_name: str | None,
        row_scale: Tensor | None,
        entropy_scale: Tensor | None = None,
    ) -> None:
        hidden, weight = head.hidden, head.weight
        self.head, self.plan, self.wanted = head, plan, wanted
        self.dtype = stat_dtype(hidden.dtype)
        self.kept = _kept_rows(hidden, keep)
        self.row_scale, self.entropy_scale, self.scale = _relative(row_scale, entropy_scale)
        self.value = hidden.new_zeros(hidden.shape[0], dtype=self.dtype)
        self.grad_hidden = (
            torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            if wanted.hidden
            else None
        )
        self.grad_entropy = (
            torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            if wanted.entropy
            else None
        )
        self.grad_weight = (
            weight.new_zeros(weight.shape, dtype=self.dtype) if wanted.weight else None
        )
        self.grad_bias = (
            weight.new_zeros(weight.shape[0], dtype=self.dtype) if wanted.bias else None
        )
        self.group, self.offset, self.vocab_size = None, 0, weight.shape[0]
        if group_name is not None:
            self.group = _resolve_process_group(group_name)
            self.offset, self.vocab_size = vocabulary_shard(weight, group_name)[:2]
        self._slope = self.tile() if head.softcap is not None and wanted.any else None

    def stats(self, count: int) -> Tensor:
        return self.value.new_zeros(count, self.value.shape[0])

    def logits(self, count: int, like: Tensor | None = None) -> Tensor:
        """Room for `count` sets of a block's logits; their gradients later take their place."""
        rows = min(self.plan.rows_per_block, self.kept.shape[0])
        like = self.head.hidden if like is None else like
        return like.new_empty(count * rows, self.head.weight.shape[0])

    def tile(self) -> Tensor:
        shape = self.plan.tile_rows, self.head.weight.shape[0]
        return self.value.new_empty(shape)

    def slope(self, rows: int) -> Tensor | None:
        return None if self._slope is None else self._slope[:rows]

    def blocks(self) -> Iterator[Tensor]:
        return iter(self.kept.split(self.plan.rows_per_block) if self.kept.numel() else ())

    def factor(self, row_scale: Tensor | None, rows: Tensor, temperature: float) -> Tensor | float:
        """What a tile's gradient is multiplied by, as a column or a number."""
        return 1.0 / temperature if row_scale is None else row_scale[rows, None] / temperature

    def store_gradient(
        self, logits: Tensor, grad: Tensor, slope: Tensor | None, factor: Tensor | float
    ) -> None:
        """Chain through temperature, scale and softcap; round to the input dtype once."""
        if slope is not None:
            grad.mul_(slope)
        logits.copy_(grad.mul_(factor))

    def products(
        self, rows: Tensor, h: Tensor, grad: Tensor, entropy: Tensor | None = None
    ) -> None:
        """The block's gradient GEMMs."""
        weight = self.head.weight
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = torch.mm(grad, weight)
        if self.grad_entropy is not None:
            self.grad_entropy[rows] = torch.mm(entropy, weight)
        if self.grad_weight is not None:
            self._accumulate_weight(grad, h)
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0, dtype=self.dtype)

    def _accumulate_weight(self, grad: Tensor, h: Tensor) -> None:
        if self.grad_weight.dtype == h.dtype:
            self.grad_weight.addmm_(grad.t(), h)
            return
        size = max(1, _SLICE_BYTES // (h.shape[1] * h.element_size()))
        for total, part in zip(self.grad_weight.split(size), grad.t().split(size), strict=True):
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


def _kept_rows(hidden: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.arange(hidden.shape[0], device=hidden.device)
    return keep.nonzero().squeeze(-1)


def _same_head(a: Head, b: Head) -> bool:
    """One weight serves both models: self-distillation with a frozen head."""
    x, y = a.weight, b.weight
    same = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
    return same and x.dtype == y.dtype and a.hidden.dtype == b.hidden.dtype


def _relative(
    row_scale: Tensor | None, entropy_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Scales divided by their largest magnitude, and that magnitude."""
    if row_scale is None:
        return None, None, None
    scale = row_scale.abs().amax() if row_scale.numel() else row_scale.new_zeros(())
    if entropy_scale is not None and entropy_scale.numel():
        scale = torch.maximum(scale, entropy_scale.abs().amax())
    divisor = torch.where(scale == 0, 1, scale)
    relative_entropy = None if entropy_scale is None else entropy_scale / divisor
    return row_scale / divisor, relative_entropy, divisor
