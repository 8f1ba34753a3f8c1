"""The course of a call in two passes over the logits, whatever computes a block's tiles.

A block of rows passes over the vocabulary for its statistics and, for the JSD or a clip, its sums;
then come the gradient of its logits and the products that take it to the parameters.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends.call import Call, same_head
from opsd_kernels.layouts import even_blocks
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

FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
# No finite log-probability gets near; a value beyond it met an entry that cannot occur.
_INFINITE = 1e20
# Fills (rows, columns) of dz, and of the entropy's own.
Gradient = Callable[[slice, list[Tensor]], None]


@dataclass(frozen=True)
class Layout:
    """Which statistics a pass keeps, and where each stands among the rows of its result."""

    heads: int
    entropy: bool
    smoothed: bool
    label: bool
    kind: int  # JSD where nothing crosses

    @property
    def names(self) -> list[str]:
        names = ["top", "total"] + ["weighted"] * self.entropy
        return names + ["plain", "number"] * self.smoothed + ["picked"] * self.label

    @property
    def count(self) -> int:
        return self.heads * len(self.names) + 2 * (self.heads == 2 and self.kind != JSD)

    def head(self, merged: Tensor, index: int) -> dict[str, Tensor]:
        rows = merged[index * len(self.names) : (index + 1) * len(self.names)]
        return dict(zip(self.names, rows, strict=True))


def divergence(
    run_type: type[Run],
    p: DivergenceProblem,
    plan: Plan,
    row_scale: Tensor | None,
    wanted: Wanted,
) -> Result:
    """Per-token divergence; gradients of sum(row_scale * value), per row for row_scale None."""
    run = run_type(p.student, plan, p.keep, wanted, p.execution.group_name, row_scale)
    kind = {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(p.beta, JSD)
    label = p.with_stats and p.labels is not None
    layout = Layout(2, p.with_stats, False, label, kind)
    two_passes = kind == JSD or p.clip is not None
    # The gradient of rounded logits is made with the value of the same rounded logits.
    rounded = kind == REVERSE_KL and plan.precision == "difference" and run.wanted.any
    joined = kind == JSD and p.clip is None and run.joins_sums_and_gradient
    # The reverse KL tells where the shares of a row are centered.
    first = replace(layout, kind=REVERSE_KL) if joined else layout
    merged = run.statistics(first.count)
    sums = run.statistics(2 if p.clip is None else 3) if two_passes or rounded else None
    heads = [p.student, p.teacher]
    for block in run.blocks():
        again = sums is not None or run.wanted.any
        tiles = run.tiles(heads, block, p.temperature, same_head(*heads), again)
        here = merged[:, block]
        labels = run.part(p.labels, block) if label else None
        tiles.statistics(first, labels, run.offset, here, run.group)
        scale = run.part(run.row_scale, block)
        if joined:
            center = _mean_log_mixture(_kl(first, here)[0], p.beta)
            found = run.sums_and_gradient(block, tiles, layout, here, center, p, scale)
            sums[:, block] = found
            continue
        if sums is not None:
            sums[:, block] = tiles.sums(layout, here, p.beta, p.clip, run.group)
        if not run.wanted.any:
            continue
        totals = _kl(layout, here)[0] if sums is None else sums[1, block]
        if rounded:
            totals = totals.masked_fill(_kl(layout, here)[1], torch.inf)
        gradient = functools.partial(
            _divergence_gradient, tiles, layout, here, totals, scale, p.beta, p.clip
        )
        run.gradients(block, tiles, gradient)
    value, infinite = (None, None) if kind == JSD else _kl(layout, merged)
    if two_passes:
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


def _divergence_gradient(
    tiles: Tiles,
    layout: Layout,
    merged: Tensor,
    totals: Tensor,
    scale: Tensor | None,
    beta: float,
    clip: float | None,
    columns: slice,
    outs: list[Tensor],
) -> None:
    tiles.divergence_gradient(layout, merged, totals, scale, beta, clip, columns, outs[0])


def logprob(
    run_type: type[Run],
    p: LogprobProblem,
    plan: Plan,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    wanted: Wanted,
) -> Result:
    """Per-token log-probability of the target; gradients as `divergence`, the entropy's beside."""
    group = p.execution.group_name
    run = run_type(p.head, plan, p.keep, wanted, group, row_scale, entropy_scale)
    smoothing = p.label_smoothing
    layout = Layout(1, p.with_entropy, smoothing != 0.0, True, JSD)
    merged = run.statistics(layout.count)
    for block in run.blocks():
        tiles = run.tiles([p.head], block, p.temperature, False, run.wanted.any)
        here, target = merged[:, block], run.part(p.target, block)
        tiles.statistics(layout, target, run.offset, here, run.group)
        if not run.wanted.any:
            continue
        needed = run.wanted.entropy or run.entropy_scale is not None
        entropy = _entropy(layout.head(here, 0)) if needed else None
        scales = run.part(run.row_scale, block), run.part(run.entropy_scale, block)
        shares = 1.0 - smoothing, smoothing / run.vocab_size
        gradient = functools.partial(
            tiles.logprob_gradient, target, here, entropy, scales, shares, run.offset
        )
        run.gradients(block, tiles, gradient)
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


class Run(Call, ABC):
    """A call's blocks of rows; a backend adds their tiles and the products with dz."""

    @property
    def everything(self) -> Tensor | slice:
        return slice(None) if self.kept is None else self.kept

    def blocks(self) -> Iterator[slice]:
        first = 0
        for size in even_blocks(self.num_kept, self.plan.rows_per_block):
            yield slice(first, first + size)
            first += size

    def part(self, values: Tensor | None, block: slice) -> Tensor | None:
        """The block's rows of a tensor with one row per token."""
        if values is None:
            return None
        return values[block] if self.kept is None else values[self.kept[block]]

    def statistics(self, count: int) -> Tensor:
        return self.value.new_empty(count, self.num_kept)

    @property
    def joins_sums_and_gradient(self) -> bool:
        """Whether `sums_and_gradient` of the JSD saves this run a pass over the logits."""
        return False

    @abstractmethod
    def tiles(
        self, heads: list[Head], block: slice, temperature: float, shared: bool, again: bool
    ) -> Tiles:
        """The block's tiles of one or two heads; `again` where a later pass looks at them."""

    @abstractmethod
    def gradients(self, block: slice, tiles: Tiles, gradient: Gradient) -> None:
        """Every slice's dz by `gradient(columns, outs)`, multiplied into the gradients."""

    def room(
        self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A buffer that every block uses again; the first block is the largest."""
        rooms = self.__dict__.setdefault("_rooms", {})
        if name not in rooms:
            rooms[name] = self.head.hidden.new_empty(rows, columns, dtype=dtype)
        return rooms[name][:rows]


class Tiles(Protocol):
    """The logits of a block of rows, tile by tile."""

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Fill `out` (K, rows), a view of any row stride, with the statistics of this block."""

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2 or 3, rows): value, sum of shares and, with a clip, the value without it."""

    def divergence_gradient(
        self,
        layout: Layout,
        merged: Tensor,
        totals: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        columns: slice,
        out: Tensor,
    ) -> None:
        """d value / d raw logits of the student, times scale, into `out` (rows, columns)."""

    def logprob_gradient(
        self,
        label: Tensor,
        merged: Tensor,
        entropy: Tensor | None,
        scales: tuple[Tensor | None, Tensor | None],
        shares: tuple[float, float],
        offset: int,
        columns: slice,
        outs: list[Tensor],
    ) -> None:
        """The same of the log-probability; `outs` may have a second place, for the entropy's."""


def gathered(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's statistics (K, rows) as (K, ranks, rows), to be merged in rank order."""
    mine = out.contiguous()
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return torch.stack(every, 1)


def _entropy(x: dict[str, Tensor]) -> Tensor:
    return x["total"].log() - x["weighted"] / x["total"]


def _logprob(x: dict[str, Tensor]) -> Tensor:
    return _restored((x["picked"] - x["top"]) - x["total"].log())


def _restored(column: Tensor) -> Tensor:
    return torch.where(column.abs() > _INFINITE, column * torch.inf, column)


def _kl(layout: Layout, merged: Tensor) -> tuple[Tensor, Tensor]:
    """One pass' KL of p from q, sum p (u_p - u_q) - log(l_p / l_q); where it is infinite."""
    totals = [layout.head(merged, i)["total"] for i in range(2)]
    own, other = totals if layout.kind == REVERSE_KL else totals[::-1]
    cross, infinite = merged[-2], merged[-1] > 0
    return (cross / own - (own / other).log()).masked_fill(infinite, torch.inf), infinite


def _mean_log_mixture(reverse_kl: Tensor, beta: float) -> Tensor:
    """log(m / s) where log(t / s) has its mean under s, about which a row's shares are centered."""
    ratio = (-reverse_kl).clamp(min=-80.0)
    return torch.log1p(beta * torch.expm1(ratio))
