"""The `blocked` schedule in plain PyTorch, for any device.

One GEMM makes a block's logits. Its rows are reduced, one tile that fits in the cache at a time, to
values, and the gradient of the logits overwrites them. One GEMM takes that gradient to the hidden
states and, for a trained head, another to its weight. Rows without loss never reach a GEMM.

Logits and their gradient are fp32 (fp64 for fp64 inputs): in 16 bits they would lose the difference
of a close pair, overflow or underflow. PyTorch rounds products of 16-bit operands to 16 bits on a
CPU, so 16-bit operands are converted, a few rows of the head at a time, and all products are fp32.
On a Xeon with AMX and fp16 arithmetic (one thread, JSD of 512 tokens, D 1024, V 32768, frozen head)
that takes 1.15 s of processor time for bfloat16 against 0.40 s with 16-bit products, and 1.17 s
against 1.03 s for float16. The C++ operators have bfloat16 products with fp32 sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from opsd_kernels.backends import row_math
from opsd_kernels.backends.context import LossContext, same_head, store_stats
from opsd_kernels.backends.largest import Largest, largest_of, topk_of
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
    TopkProblem,
    stat_dtype,
)

_GATHERED_ELEMENTS = 2**20  # of rows of the head


def divergence(
    p: DivergenceProblem, plan: Plan, row_scale: Tensor | None, needed: GradsNeeded
) -> Result:
    """Divergence of each token; gradients of sum(row_scale * value), or of each value if None."""
    run = _Pass(p.student, plan, p.keep, needed, p.execution.group_name, row_scale)
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
    rows: Tensor,  # (r,) indices of the tile's tokens
    z_s: Tensor,  # (r, V), overwritten by the gradient
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
    columns = {}
    if p.with_stats:
        for name, log_p, prob in (("student", log_s, s), ("teacher", log_t, t)):
            columns[f"{name}_entropy"] = row_math.entropy(log_p, prob, work, run.group)
            if p.labels is not None:
                columns[f"{name}_logprob"] = row_math.gather_label(
                    log_p, p.labels[rows, None], run.offset, run.group
                )
    value, removed = row_math.divergence_(
        log_s,
        s,
        log_t,
        t,
        work,
        beta=p.beta,
        clip=p.clip,
        needs_grad=run.needed.any,
        group=run.group,
    )
    run.value[rows] = value.squeeze(-1)
    if p.with_stats:
        if removed is not None:
            columns["clipped_mass"] = removed
        run.store_stats(stats, DIVERGENCE_STATS, rows, columns)
    if run.needed.any:
        run.store_gradient(z_s, log_s, slope, run.factor(run.row_scale, rows))


def logprob(
    p: LogprobProblem,
    plan: Plan,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    lse_scale: Tensor | None,
    needed: GradsNeeded,
) -> Result:
    """Log-probability of each target; gradients as `divergence`, the entropy's separately."""
    scales = row_scale, entropy_scale, lse_scale
    run = _Pass(p.head, plan, p.keep, needed, p.execution.group_name, *scales, p.known)
    stats = run.stats(len(LOGPROB_STATS))
    logits = run.logits(p.head, 2 if needed.entropy else 1)
    tiles = [run.tile() for _ in range(3)]
    for index, rows in enumerate(run.blocks()):
        size = rows.shape[0]
        h = p.head.hidden[rows]
        blocks = [logits[:size], logits[size : 2 * size]] if needed.entropy else [logits[:size]]
        run.multiply(h, p.head.weight, blocks[0])
        for first in range(0, size, plan.tile_rows):
            part = slice(first, first + plan.tile_rows)
            _logprob_tile(p, run, rows[part], [z[part] for z in blocks], tiles, stats)
        run.add_products(rows, h, blocks, first=index == 0)
    return run.result(stats)


def _logprob_tile(
    p: LogprobProblem,
    run: _Pass,
    rows: Tensor,  # (r,) indices of the tile's tokens
    blocks: list[Tensor],  # (r, V) each, overwritten by the gradients
    tiles: list[Tensor],
    stats: Tensor,
) -> None:
    log_p, prob, work = (tile[: rows.shape[0]] for tile in tiles)
    slope = run.slope(rows.shape[0])
    row_math.to_logits_(log_p.copy_(blocks[0]), p.head, slope)
    columns = {}
    if p.with_predicted:
        columns["predicted"] = row_math.argmax(log_p, run.offset, run.group)
    if run.known_logits is not None:
        run.known_logits[rows] = row_math.logits_at(log_p, run.known_ids(rows))
    lse = row_math.log_softmax_(log_p, prob, run.group)
    target = p.target[rows, None]
    logprob = row_math.gather_label(log_p, target, run.offset, run.group)
    weight = None if p.label_weight is None else p.label_weight[rows, None]
    mean = share = None
    if p.label_smoothing != 0.0:
        mean, share = row_math.weighted_mean(log_p, p.head.class_weight, run.vocab_size, run.group)
    run.value[rows] = value_of(p, logprob, weight, mean, lse).squeeze(-1)
    columns |= {"logprob": logprob, "lse": lse}
    if p.with_entropy:
        entropy = columns["entropy"] = row_math.entropy(log_p, prob, work, run.group)
        row_math.entropy_grad_(work, prob, entropy)
    run.store_stats(stats, LOGPROB_STATS, rows, columns)
    if not run.needed.any:
        return
    rates, uniform = rates_of(p, weight, share, lse), p.label_smoothing / run.vocab_size
    factor = run.factor(run.row_scale, rows)
    if run.lse_scale is not None and run.row_scale is not None:
        rates = rates_with_lse(rates, run.row_scale[rows, None], run.lse_scale[rows, None])
        factor = 1.0 / p.head.temperature
    grad = row_math.logprob_grad_(prob, target, rates, uniform, p.head.class_weight, run.offset)
    if run.entropy_scale is not None:  # both scales are known: one product serves both
        work.mul_(run.factor(run.entropy_scale, rows))
        grad.mul_(factor).add_(work)
        factor = 1.0
    elif run.needed.entropy:
        run.store_gradient(blocks[1], work, slope, 1.0 / p.head.temperature)
    run.store_gradient(blocks[0], grad, slope, factor)
    if p.known is not None:
        store_entries(blocks[0], *run.known_entries(rows))


def store_entries(dz: Tensor, ids: Tensor, values: Tensor) -> None:
    """dz[row, ids[row, k]] = values[row, k] (rows, K), where dz (rows, V) has the id."""
    row, k = ((ids >= 0) & (ids < dz.shape[1])).nonzero(as_tuple=True)
    dz[row, ids[row, k]] = values[row, k].to(dz.dtype)


def add_target_sums(out: Tensor, factors: Tensor, weight: Tensor, ids: Tensor) -> None:
    """out (N, D) += sum_k factors[n, k] weight[ids[n, k]], fp32 or fp64; other ids add nothing."""
    owned = (ids >= 0) & (ids < weight.shape[0])
    factors = torch.where(owned, factors, 0)
    for rows, columns in _parts_of(ids, weight.shape[1]):
        vectors = weight[ids[rows, columns].clamp(0, weight.shape[0] - 1)].to(out.dtype)
        out[rows] += torch.einsum("nkd,nk->nd", vectors, factors[rows, columns])


def _parts_of(ids: Tensor, depth: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of ids (N, K) whose rows of the head take little memory at a time."""
    (tokens, count), most = ids.shape, max(1, _GATHERED_ELEMENTS // depth)
    width = min(count, most)
    height = max(1, most // width)
    for row in range(0, tokens, height):
        for column in range(0, count, width):
            yield slice(row, row + height), slice(column, column + width)


def topk(p: TopkProblem, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, k), ids (N, k), lse (N,)) of the k largest logits."""
    run = _Pass(p.head, plan, p.keep, GradsNeeded(), p.execution.group_name, None)
    return topk_of(run, p, _largest(p, run))


def _largest(p: TopkProblem, run: _Pass) -> Iterator[Largest]:
    """The largest logits of each tile of kept rows, in order."""
    logits = run.logits(p.head, 1)
    for rows in run.blocks():
        run.multiply(p.head.hidden[rows], p.head.weight, logits[: len(rows)])
        for z in logits[: len(rows)].split(run.plan.tile_rows):
            row_math.to_logits_(z, p.head, None)
            z.clamp_(min=row_math.LOG_ZERO)
            logit, ids = largest_of(z, min(p.k, z.shape[1]))
            yield Largest(logit, ids, z.sub_(logit[:, :1]).exp_().sum(-1).log_())


class _Pass(LossContext):
    """Buffers, products and results of one call."""

    def stats(self, count: int) -> Tensor:
        return self.value.new_zeros(count, self.value.shape[0])

    def store_stats(
        self, stats: Tensor, names: tuple[str, ...], rows: Tensor, columns: dict[str, Tensor]
    ) -> None:
        """Write the statistics (r, 1) of a tile's tokens into their rows of `stats`."""
        store_stats(stats, names, rows, {n: x.squeeze(-1) for n, x in columns.items()})

    def logits(self, head: Head, count: int) -> Tensor:
        """Buffer of `count` sets of a block's logits, which their gradients overwrite."""
        rows, dtype = min(self.plan.rows_per_block, self.num_kept), stat_dtype(head.hidden.dtype)
        return head.hidden.new_empty(count * rows, head.weight.shape[0], dtype=dtype)

    def multiply(self, h: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (r, V) = h @ weight.T in the dtype of `out`."""
        if weight.dtype == out.dtype:
            torch.mm(h, weight.t(), out=out)
            return
        h = h.to(out.dtype)
        for columns, part in self.widened(weight, self.plan.widened_rows):
            torch.mm(h, part.t(), out=out[:, columns])

    def add_products(
        self, rows: Tensor | slice, h: Tensor, dz: list[Tensor], *, first: bool
    ) -> None:
        """As the base class; operands of 16 bits are widened on the way."""
        if h.dtype == self.dtype or not self.needed.any:
            super().add_products(rows, h, dz, first=first)
            return
        self.add_widened_products(rows, h, dz, self.plan.widened_rows, first=first)

    def tile(self) -> Tensor:
        shape = self.plan.tile_rows, self.head.weight.shape[0]
        return self.value.new_empty(shape)

    @functools.cached_property
    def _slopes(self) -> Tensor:
        return self.tile()

    def slope(self, rows: int) -> Tensor | None:
        """Buffer of d softcap / d raw, if the gradient needs it."""
        return self._slopes[:rows] if self.head.softcap is not None and self.needed.any else None

    def blocks(self) -> Iterator[Tensor]:
        """Indices of the kept tokens, block by block."""
        kept = self.kept
        if kept is None:
            kept = torch.arange(self.num_kept, device=self.head.hidden.device)
        return iter(kept.split(even_blocks(self.num_kept, self.plan.rows_per_block)))

    def factor(self, row_scale: Tensor | None, rows: Tensor) -> Tensor | float:
        """row_scale / temperature of a tile's rows, as a column or a number."""
        unit = 1.0 if row_scale is None else row_scale[rows, None]
        return unit / self.head.temperature

    def store_gradient(
        self, logits: Tensor, grad: Tensor, slope: Tensor | None, factor: Tensor | float
    ) -> None:
        """logits <- grad * softcap's slope * factor."""
        if slope is not None:
            grad.mul_(slope)
        logits.copy_(grad.mul_(factor))
