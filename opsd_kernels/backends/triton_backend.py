"""Both schedules on a GPU: Triton kernels for tiles of logits, cuBLAS for the gradients' products.

A block of rows passes over the vocabulary for its statistics and, for the JSD or a clip, its sums;
then the gradient of the logits is made one slice of the vocabulary at a time and multiplied into
fp32 sums. `blocked` reads the tiles from logits a GEMM left in memory, `streaming` multiplies them
from hidden states and head in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opsd_kernels.backends.call import Call, same_head
from opsd_kernels.backends.triton_launch import Layout, Source, Tiles
from opsd_kernels.plan import Plan
from opsd_kernels.problem import (
    DIVERGENCE_STATS,
    LOGPROB_STATS,
    DivergenceProblem,
    Head,
    LogprobProblem,
    Result,
    Wanted,
)

_FORWARD_KL, _REVERSE_KL, _JSD = 0, 1, 2
# No finite log-probability gets near; a value beyond it met an entry that cannot occur.
_INFINITE = 1e20


def divergence(
    p: DivergenceProblem, plan: Plan, row_scale: Tensor | None, wanted: Wanted
) -> Result:
    """Per-token divergence; gradients of sum(row_scale * value), per row for row_scale None."""
    run = _Run(p.student, plan, p.keep, wanted, p.execution.group_name, row_scale)
    kind = {0.0: _FORWARD_KL, 1.0: _REVERSE_KL}.get(p.beta, _JSD)
    label = p.with_stats and p.labels is not None
    layout = Layout(2, p.with_stats, False, label, kind)
    two_passes = kind == _JSD or p.clip is not None
    merged = run.statistics(layout.count)
    sums = run.statistics(2 if p.clip is None else 3) if two_passes else None
    heads = [p.student, p.teacher]
    for block in run.blocks():
        tiles, h = run.tiles(heads, block, p.temperature, same_head(*heads))
        here = merged[:, block]
        labels = run.part(p.labels, block) if label else None
        tiles.statistics(layout, labels, run.offset, here, run.group)
        if sums is not None:
            sums[:, block] = tiles.sums(layout, here, p.beta, p.clip, run.group)
        if not run.wanted.any:
            continue
        totals = _kl(layout, here)[0] if sums is None else sums[1, block]
        scale = run.part(run.row_scale, block)

        def gradient(columns: slice, outs: list[Tensor], _=(tiles, here, totals, scale)) -> None:
            tiles, here, totals, scale = _
            tiles.divergence_gradient(layout, here, totals, scale, p.beta, p.clip, columns, outs[0])

        run.gradients(block, h, gradient)
    value, infinite = (None, None) if kind == _JSD else _kl(layout, merged)
    if sums is not None:
        value = sums[0]
    run.value[run.everything] = value
    stats = run.value.new_zeros(len(DIVERGENCE_STATS) if p.with_stats else 0, len(run.value))
    if p.with_stats:
        removed = None
        if p.clip is not None:
            removed = sums[2] - sums[0]
            removed = removed if infinite is None else removed.masked_fill(infinite, torch.inf)
        found = [layout.head(merged, i) for i in range(2)]
        columns = [_entropy(x) for x in found]
        columns += [_logprob(x) if label else None for x in found]
        for row, column in zip(stats, [*columns, removed], strict=True):
            if column is not None:
                row[run.everything] = column
    return run.result(stats)


def logprob(
    p: LogprobProblem,
    plan: Plan,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    wanted: Wanted,
) -> Result:
    """Per-token log-probability of the target; gradients as `divergence`, the entropy's beside."""
    run = _Run(p.head, plan, p.keep, wanted, p.execution.group_name, row_scale, entropy_scale)
    smoothing = p.label_smoothing
    layout = Layout(1, p.with_entropy, smoothing != 0.0, True, _JSD)
    merged = run.statistics(layout.count)
    for block in run.blocks():
        tiles, h = run.tiles([p.head], block, p.temperature, False)
        here, target = merged[:, block], run.part(p.target, block)
        tiles.statistics(layout, target, run.offset, here, run.group)
        if not run.wanted.any:
            continue
        needed = wanted.entropy or entropy_scale is not None
        entropy = _entropy(layout.head(here, 0)) if needed else None
        scales = run.part(run.row_scale, block), run.part(run.entropy_scale, block)
        shares = 1.0 - smoothing, smoothing / run.vocab_size

        def gradient(
            columns: slice, outs: list[Tensor], _=(tiles, here, target, entropy, scales, shares)
        ) -> None:
            tiles, here, target, entropy, scales, shares = _
            tiles.logprob_gradient(target, here, entropy, scales, shares, run.offset, columns, outs)

        run.gradients(block, h, gradient)
    found = layout.head(merged, 0)
    picked = _logprob(found)
    value = picked
    if smoothing != 0.0:
        mean = found["plain"] / run.vocab_size - found["total"].log()
        value = _restored((1 - smoothing) * picked + smoothing * mean)
    run.value[run.everything] = value
    stats = run.value.new_zeros(len(LOGPROB_STATS), len(run.value))
    stats[0, run.everything] = picked
    stats[2, run.everything] = found["top"] + found["total"].log()
    if p.with_entropy:
        stats[1, run.everything] = _entropy(found)
    return run.result(stats)


class _Run(Call):
    """A call's blocks of rows, and the products that turn a slice's dz into gradients."""

    @property
    def everything(self) -> Tensor | slice:
        return slice(None) if self.kept is None else self.kept

    def blocks(self) -> Iterator[slice]:
        size = self.plan.rows_per_block
        for first in range(0, self.num_kept, size):
            yield slice(first, min(first + size, self.num_kept))

    def part(self, values: Tensor | None, block: slice) -> Tensor | None:
        """The block's rows of a tensor with one row per token."""
        if values is None:
            return None
        return values[block] if self.kept is None else values[self.kept[block]]

    def statistics(self, count: int) -> Tensor:
        return self.value.new_empty(count, self.num_kept)

    def tiles(
        self, heads: list[Head], block: slice, temperature: float, shared: bool
    ) -> tuple[Tiles, Tensor]:
        """The block's source of tiles, and the student's hidden states."""
        hidden = [self.part(head.hidden, block) for head in heads]
        vocab = heads[0].weight.shape[0]
        if self.plan.schedule == "streaming":
            sources = [
                Source(h, head.weight, head.bias, head.softcap)
                for h, head in zip(hidden, heads, strict=True)
            ]
            return Tiles(sources, vocab, temperature, shared), hidden[0]
        size = hidden[0].shape[0]
        logits = self._room("logits", len(heads) * size, vocab)
        if shared:  # one GEMM reads the head once for both models
            _multiply(logits, torch.cat(hidden), heads[0].weight.t(), add=False)
        else:
            for z, h, head in zip(logits.split(size), hidden, heads, strict=True):
                _multiply(z, h, head.weight.t(), add=False)
        sources = [
            Source(z, None, head.bias, head.softcap)
            for z, head in zip(logits.split(size), heads, strict=True)
        ]
        return Tiles(sources, vocab, temperature, False), hidden[0]

    def gradients(self, block: slice, h: Tensor, gradient) -> None:
        """Every slice's dz by `gradient(columns, outs)`, multiplied into the gradients."""
        weight, size = self.head.weight, h.shape[0]
        vocab, width = weight.shape[0], self.plan.slice_columns
        # Which dz makes which gradient of the hidden states.
        pairs = [(0, self.grad_hidden), (1, self.grad_entropy)]
        pairs = [(i, grad) for i, grad in pairs if grad is not None]
        count = 2 if self.wanted.entropy else 1
        sums = {i: self._room(f"dh {i}", size, weight.shape[1]).zero_() for i, _ in pairs}
        dz = [self._room(f"dz {i}", size, width, h.dtype) for i in range(count)]
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

    def _room(
        self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A buffer that every block uses again; the first block is the largest."""
        rooms = self.__dict__.setdefault("_rooms", {})
        if name not in rooms:
            rooms[name] = self.head.hidden.new_empty(rows, columns, dtype=dtype)
        return rooms[name][:rows]


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


def _entropy(x: dict[str, Tensor]) -> Tensor:
    return x["total"].log() - x["weighted"] / x["total"]


def _logprob(x: dict[str, Tensor]) -> Tensor:
    return _restored((x["picked"] - x["top"]) - x["total"].log())


def _restored(column: Tensor) -> Tensor:
    return torch.where(column.abs() > _INFINITE, column * torch.inf, column)


def _kl(layout: Layout, merged: Tensor) -> tuple[Tensor, Tensor]:
    """One pass' KL of p from q, sum p (u_p - u_q) - log(l_p / l_q); where it is infinite."""
    totals = [layout.head(merged, i)["total"] for i in range(2)]
    own, other = totals if layout.kind == _REVERSE_KL else totals[::-1]
    cross, infinite = merged[-2], merged[-1] > 0
    return (cross / own - (own / other).log()).masked_fill(infinite, torch.inf), infinite
