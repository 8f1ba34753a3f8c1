"""The `blocked` schedule in plain PyTorch, for any device.

A block of rows goes through one GEMM to logits; its rows are folded tile by tile, in cache, into
values and, in place, into the gradient of the logits; one GEMM takes that to the hidden states and
one, when the head is trained, to its weight. Rows that carry no loss never reach a GEMM.

Logits and their gradient are fp32 (fp64 for fp64): rounded to 16 bits they would lose what a close
pair differs by, overflow or underflow. PyTorch multiplies 16-bit operands to 16 bits on a CPU, so
operands of 16 bits are converted, a few rows of the head at a time, and all products are fp32. On a
Xeon with AMX and fp16 arithmetic (one thread, JSD of 512 tokens, D 1024, V 32768, frozen head) that
takes 1.15 s of processor time for bfloat16, where 16-bit products took 0.40 s, and 1.17 s for
float16, where they took 1.03 s; the C++ operators have bfloat16 products with fp32 sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from opsd_kernels.backends import row_math
from opsd_kernels.backends.context import LossContext, same_head
from opsd_kernels.backends.logprob_terms import rates_of, rates_with_lse, value_of
from opsd_kernels.layouts import even_blocks
from opsd_kernels.plan import Plan
from opsd_kernels.problem import (
    DIVERGENCE_STATS,
    LOGPROB_STATS,
    DivergenceProblem,
    GradsNeeded,
    Head,
    LogprobProblem,
    Result,
    stat_dtype,
)


def divergence(
    p: DivergenceProblem, plan: Plan, row_scale: Tensor | None, wanted: GradsNeeded
) -> Result:
    """Per-token divergence; gradients of sum(row_scale * value), per row for row_scale None."""
    run = _Pass(p.student, plan, p.keep, wanted, p.execution.group_name, row_scale)
    stats = run.stats(len(DIVERGENCE_STATS) if p.with_stats else 0)
    shared = same_head(p.student, p.teacher)
    logits = run.logits(p.student, 2 if shared else 1)
    logits_t = logits if shared else run.logits(p.teacher, 1)
    tiles = [run.tile() for _ in range(5)]
    for index, rows in enumerate(run.blocks()):
        size = rows.shape[0]
        h_s, h_t = p.student.hidden[rows], p.teacher.hidden[rows]
        z_s, z_t = logits[:size], logits_t[size : 2 * size] if shared else logits_t[:size]
        if shared:  # one GEMM reads the head once for both models
            run.multiply(torch.cat([h_s, h_t]), p.student.weight, logits[: 2 * size])
        else:
            run.multiply(h_s, p.student.weight, z_s)
            run.multiply(h_t, p.teacher.weight, z_t)
        for first in range(0, size, plan.tile_rows):
            part = slice(first, first + plan.tile_rows)
            _divergence_tile(p, run, rows[part], z_s[part], z_t[part], tiles, stats)
        run.add_products(rows, h_s, [z_s], first=index == 0)
    return run.result(stats)


def _divergence_tile(
    p: DivergenceProblem,
    run: _Pass,
    rows: Tensor,
    z_s: Tensor,
    z_t: Tensor,
    tiles: list[Tensor],
    stats: Tensor,
) -> None:
    log_s, log_t, s, t, work = (tile[: rows.shape[0]] for tile in tiles)
    slope = run.slope(rows.shape[0])
    row_math.to_logits_(log_s.copy_(z_s), p.student, slope)
    row_math.to_logits_(log_t.copy_(z_t), p.teacher, None)
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
        run.store_gradient(z_s, log_s, slope, run.factor(run.row_scale, rows))


def logprob(
    p: LogprobProblem,
    plan: Plan,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    lse_scale: Tensor | None,
    wanted: GradsNeeded,
) -> Result:
    """Per-token log-probability of the target; gradients as `divergence`, the entropy's beside."""
    scales = row_scale, entropy_scale, lse_scale
    run = _Pass(p.head, plan, p.keep, wanted, p.execution.group_name, *scales)
    stats = run.stats(len(LOGPROB_STATS))
    logits = run.logits(p.head, 2 if wanted.entropy else 1)
    tiles = [run.tile() for _ in range(3)]
    for index, rows in enumerate(run.blocks()):
        size = rows.shape[0]
        h = p.head.hidden[rows]
        blocks = [logits[:size], logits[size : 2 * size]] if wanted.entropy else [logits[:size]]
        run.multiply(h, p.head.weight, blocks[0])
        for first in range(0, size, plan.tile_rows):
            part = slice(first, first + plan.tile_rows)
            _logprob_tile(p, run, rows[part], [z[part] for z in blocks], tiles, stats)
        run.add_products(rows, h, blocks, first=index == 0)
    return run.result(stats)


def _logprob_tile(
    p: LogprobProblem,
    run: _Pass,
    rows: Tensor,
    blocks: list[Tensor],
    tiles: list[Tensor],
    stats: Tensor,
) -> None:
    log_p, prob, work = (tile[: rows.shape[0]] for tile in tiles)
    slope = run.slope(rows.shape[0])
    row_math.to_logits_(log_p.copy_(blocks[0]), p.head, slope)
    if p.with_predicted:
        stats[3, rows] = row_math.predict(log_p, run.offset, run.group).squeeze(-1)
    lse = row_math.log_softmax_(log_p, prob, run.group)
    target = p.target[rows, None]
    logprob = row_math.pick(log_p, target, run.offset, run.group)
    weight = None if p.label_weight is None else p.label_weight[rows, None]
    mean = share = None
    if p.label_smoothing != 0.0:
        mean, share = row_math.weighted_mean(log_p, p.head.class_weight, run.vocab_size, run.group)
    run.value[rows] = value_of(p, logprob, weight, mean, lse).squeeze(-1)
    stats[0, rows], stats[2, rows] = logprob.squeeze(-1), lse.squeeze(-1)
    if p.with_entropy:
        entropy = row_math.entropy(log_p, prob, work, run.group)
        stats[1, rows] = entropy.squeeze(-1)
        row_math.entropy_grad_(work, prob, entropy)
    if not run.wanted.any:
        return
    rates, uniform = rates_of(p, weight, share, lse), p.label_smoothing / run.vocab_size
    factor = run.factor(run.row_scale, rows)
    if run.lse_scale is not None:
        scales = run.row_scale[rows, None], run.lse_scale[rows, None]
        rates, factor = rates_with_lse(rates, *scales), 1.0 / p.head.temperature
    grad = row_math.logprob_grad_(prob, target, rates, uniform, p.head.class_weight, run.offset)
    if run.entropy_scale is not None:  # both upstreams are known: one product serves both
        work.mul_(run.factor(run.entropy_scale, rows))
        grad.mul_(factor).add_(work)
        factor = 1.0
    elif run.wanted.entropy:
        run.store_gradient(blocks[1], work, slope, 1.0 / p.head.temperature)
    run.store_gradient(blocks[0], grad, slope, factor)


class _Pass(LossContext):
    """What one call allocates and fills: buffers by the plan, values and gradients by block."""

    def stats(self, count: int) -> Tensor:
        return self.value.new_zeros(count, self.value.shape[0])

    def logits(self, head: Head, count: int) -> Tensor:
        """Room for `count` sets of a block's logits; their gradients later take their place."""
        rows, dtype = min(self.plan.rows_per_block, self.num_kept), stat_dtype(head.hidden.dtype)
        return head.hidden.new_empty(count * rows, head.weight.shape[0], dtype=dtype)

    def multiply(self, h: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (r, V) = h @ weight.T in the dtype of `out`."""
        if weight.dtype == out.dtype:
            torch.mm(h, weight.t(), out=out)
            return
        h = h.to(out.dtype)
        for columns, part in self._widened(weight, out.dtype):
            torch.mm(h, part.t(), out=out[:, columns])

    def _widened(self, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The head in `dtype`, as many of its rows at a time as the plan has room for."""
        vocab, width = weight.shape[0], self.plan.widened_rows
        room = weight.new_empty(min(width, vocab), weight.shape[1], dtype=dtype)
        for first in range(0, vocab, width):
            columns = slice(first, min(first + width, vocab))
            yield columns, room[: columns.stop - first].copy_(weight[columns])

    def add_products(
        self, rows: Tensor | slice, h: Tensor, dz: list[Tensor], *, first: bool
    ) -> None:
        """What a block's dz, and the entropy's own as a second, give to each gradient."""
        if h.dtype == self.dtype or not self.wanted.any:
            super().add_products(rows, h, dz, first=first)
            return
        pairs = list(zip((self.grad_hidden, self.grad_entropy), dz, strict=False))
        pairs = [
            (grad, z, grad.new_zeros(h.shape, dtype=self.dtype))
            for grad, z in pairs
            if grad is not None
        ]
        h = h.to(self.dtype)
        for columns, part in self._widened(self.head.weight, self.dtype):
            for _, z, total in pairs:
                total.addmm_(z[:, columns], part)
            if self.grad_weight is not None:
                self.grad_weight[columns].addmm_(dz[0][:, columns].t(), h, beta=int(not first))
        for grad, _, total in pairs:
            grad[rows] = total.to(grad.dtype)
        if self.grad_bias is not None:
            self.grad_bias += dz[0].sum(0)

    def tile(self) -> Tensor:
        shape = self.plan.tile_rows, self.head.weight.shape[0]
        return self.value.new_empty(shape)

    @functools.cached_property
    def _slopes(self) -> Tensor:
        return self.tile()

    def slope(self, rows: int) -> Tensor | None:
        return self._slopes[:rows] if self.head.softcap is not None and self.wanted.any else None

    def blocks(self) -> Iterator[Tensor]:
        kept = self.kept
        if kept is None:
            kept = torch.arange(self.num_kept, device=self.head.hidden.device)
        return iter(kept.split(even_blocks(self.num_kept, self.plan.rows_per_block)))

    def factor(self, row_scale: Tensor | None, rows: Tensor) -> Tensor | float:
        """What a tile's gradient is multiplied by, as a column or a number."""
        unit = 1.0 if row_scale is None else row_scale[rows, None]
        return unit / self.head.temperature

    def store_gradient(
        self, logits: Tensor, grad: Tensor, slope: Tensor | None, factor: Tensor | float
    ) -> None:
        """Chain through temperature, scale and softcap."""
        if slope is not None:
            grad.mul_(slope)
        logits.copy_(grad.mul_(factor))
