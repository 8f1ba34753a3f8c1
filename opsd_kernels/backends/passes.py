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

from opsd_kernels.backends.context import LossContext, same_head
from opsd_kernels.backends.logprob_terms import (
    rates_of,
    rates_with_lse,
    restore_infinity,
    value_of,
)
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
)

FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
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
    predicted: bool = False  # of one head

    @property
    def names(self) -> list[str]:
        names = ["top", "total"] + ["weighted"] * self.entropy
        names += ["plain", "number"] * self.smoothed + ["picked"] * self.label
        return names + ["best"] * self.predicted

    @property
    def count(self) -> int:
        return self.heads * len(self.names) + 2 * (self.heads == 2 and self.kind != JSD)

    def head(self, merged: Tensor, index: int) -> dict[str, Tensor]:
        rows = merged[index * len(self.names) : (index + 1) * len(self.names)]
        return dict(zip(self.names, rows, strict=True))


@dataclass(frozen=True)
class _Passes:
    """The passes of a divergence over its logits, and what the first of them keeps."""

    layout: Layout
    first: Layout  # of the statistics
    summed: bool  # a second pass makes the value
    rounded: bool  # a second pass makes the gradient's constant, of rounded logits
    joined: bool  # the second pass makes the gradient too
    resident: bool  # one pass makes everything


def _passes(p: DivergenceProblem, run: BlockedPass) -> _Passes:
    kind = {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(p.beta, JSD)
    layout = Layout(2, p.with_stats, False, p.with_stats and p.labels is not None, kind)
    joined = kind == JSD and p.clip is None and run.joined is not None
    return _Passes(
        layout=layout,
        # The reverse KL tells where the shares of a row are centered.
        first=replace(layout, kind=REVERSE_KL) if joined else layout,
        summed=kind == JSD or p.clip is not None,
        # The gradient of rounded logits is made with the value of the same rounded logits.
        rounded=kind == REVERSE_KL and run.plan.precision == "difference" and run.wanted.any,
        joined=joined,
        resident=p.clip is None and run.resident,
    )


def divergence(
    run_type: type[BlockedPass],
    p: DivergenceProblem,
    plan: Plan,
    row_scale: Tensor | None,
    wanted: GradsNeeded,
) -> Result:
    """Per-token divergence; gradients of sum(row_scale * value), per row for row_scale None."""
    run = run_type(p.student, plan, p.keep, wanted, p.execution.group_name, row_scale)
    passes = _passes(p, run)
    merged, sums = run.statistics(passes.first.count), None
    if passes.summed or passes.rounded:
        sums = run.statistics(2 if p.clip is None else 3)
    for block in run.blocks():
        _divergence_block(p, run, passes, block, merged[:, block], sums)
    layout = passes.layout
    value, infinite = (None, None) if layout.kind == JSD else _kl(layout, merged)
    run.value[run.everything] = sums[0] if passes.summed else value
    stats = run.value.new_zeros(len(DIVERGENCE_STATS) if p.with_stats else 0, len(run.value))
    if p.with_stats:
        removed = None
        if p.clip is not None:
            removed = sums[2] - sums[0]
            removed = removed if infinite is None else removed.masked_fill(infinite, torch.inf)
        found = [layout.head(merged, i) for i in range(2)]
        columns = [_entropy(x) for x in found]
        columns += [_logprob(x) if layout.label else None for x in found]
        for row, column in zip(stats, [*columns, removed], strict=True):
            if column is not None:
                row[run.everything] = column
    return run.result(stats)


def _divergence_block(
    p: DivergenceProblem,
    run: BlockedPass,
    passes: _Passes,
    block: slice,
    merged: Tensor,  # (K, rows) of this block
    sums: Tensor | None,  # (2 or 3, rows) of all
) -> None:
    """Fill the block's statistics and sums, and add its gradients."""
    heads, layout = [p.student, p.teacher], passes.layout
    again = sums is not None or run.wanted.any
    tiles = run.tiles(heads, block, same_head(*heads), again)
    labels = run.part(p.labels, block) if layout.label else None
    scale = run.part(run.row_scale, block)
    if passes.resident:
        found = tiles.resident(layout, labels, run.offset, merged, p.beta, scale)
        if sums is not None:
            sums[:, block] = found
        run.gradients(block, tiles, lambda columns, outs: None)
        return
    tiles.statistics(passes.first, labels, run.offset, merged, run.group)
    if passes.joined:
        center = _mean_log_mixture(_kl(passes.first, merged)[0], p.beta)
        sums[:, block] = run.joined(block, tiles, layout, merged, center, p, scale)
        return
    if sums is not None:
        sums[:, block] = tiles.sums(layout, merged, p.beta, p.clip, run.group)
    if not run.wanted.any:
        return
    totals = _kl(layout, merged)[0] if sums is None else sums[1, block]
    if passes.rounded:
        totals = totals.masked_fill(_kl(layout, merged)[1], torch.inf)
    gradient = functools.partial(
        _divergence_gradient, tiles, layout, merged, totals, scale, p.beta, p.clip
    )
    run.gradients(block, tiles, gradient)


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
    run_type: type[BlockedPass],
    p: LogprobProblem,
    plan: Plan,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    lse_scale: Tensor | None,
    wanted: GradsNeeded,
) -> Result:
    """Per-token log-probability of the target; gradients as `divergence`, the entropy's beside."""
    group = p.execution.group_name
    run = run_type(p.head, plan, p.keep, wanted, group, row_scale, entropy_scale, lse_scale)
    smoothing = p.label_smoothing
    layout = Layout(1, p.with_entropy, smoothing != 0.0, True, JSD, p.with_predicted)
    merged = run.statistics(layout.count)
    for block in run.blocks():
        tiles = run.tiles([p.head], block, False, run.wanted.any)
        here, target = merged[:, block], run.part(p.target, block)
        tiles.statistics(layout, target, run.offset, here, run.group)
        if not run.wanted.any:
            continue
        needed = run.wanted.entropy or run.entropy_scale is not None
        entropy = _entropy(layout.head(here, 0)) if needed else None
        scales = run.part(run.row_scale, block), run.part(run.entropy_scale, block)
        found, weight = layout.head(here, 0), run.part(p.label_weight, block)
        share = found["number"] / run.vocab_size if smoothing != 0.0 else None
        rates = rates_of(p, weight, share, _lse(found))
        if run.lse_scale is not None:
            rates = rates_with_lse(rates, scales[0], run.part(run.lse_scale, block))
            scales = None, scales[1]
        rates = None if rates is None else torch.stack(rates)
        gradient = functools.partial(
            tiles.logprob_gradient, target, here, entropy, scales, rates,
            smoothing / run.vocab_size, run.offset,
        )  # fmt: skip
        run.gradients(block, tiles, gradient)
    found = layout.head(merged, 0)
    picked, mean = _logprob(found), None
    if smoothing != 0.0:
        mean = (found["plain"] - found["number"] * found["total"].log()) / run.vocab_size
    weight = None if p.label_weight is None else p.label_weight[run.everything]
    run.value[run.everything] = value_of(p, picked, weight, mean, _lse(found))
    stats = run.value.new_zeros(len(LOGPROB_STATS), len(run.value))
    stats[0, run.everything] = picked
    stats[2, run.everything] = _lse(found)
    if p.with_entropy:
        stats[1, run.everything] = _entropy(found)
    if p.with_predicted:  # a row of NaN has no maximum
        best = found["best"]
        stats[3, run.everything] = torch.where(best < run.vocab_size, best, 0)
    return run.result(stats)


class BlockedPass(LossContext, ABC):
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
    def joined(self) -> Callable[..., Tensor] | None:
        """What makes a JSD's sums and its gradient from the same logits, where that saves a pass.

        Called with (block, tiles, layout, merged, center, problem, scale); fills the block's
        gradient and returns (2, rows): value and sum of the shares about `center`.
        """
        return None

    @property
    def resident(self) -> bool:
        """Whether tiles make a pair's statistics, sums and dz, in place, in one pass."""
        return False

    @abstractmethod
    def tiles(self, heads: list[Head], block: slice, shared: bool, again: bool) -> Tiles:
        """The block's tiles of one or two heads; `again` where a later pass looks at them."""

    @abstractmethod
    def gradients(self, block: slice, tiles: Tiles, gradient: Gradient) -> None:
        """Every slice's dz by `gradient(columns, outs)`, multiplied into the gradients."""

    def room(
        self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A buffer that every block uses again; the first block is the largest."""
        if name not in self.rooms:
            self.rooms[name] = self.head.hidden.new_empty(rows, columns, dtype=dtype)
        return self.rooms[name][:rows]


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
        rates: Tensor | None,
        uniform: float,
        offset: int,
        columns: slice,
        outs: list[Tensor],
    ) -> None:
        """The same of the log-probability; `outs` may have a second place, for the entropy's.

        rates (2, rows): what stands at the label and what each p is multiplied by, None for 1.
        """


def gathered(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's statistics (K, rows) as (K, ranks, rows), to be merged in rank order."""
    mine = out.contiguous()
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return torch.stack(every, 1)


def _lse(x: dict[str, Tensor]) -> Tensor:
    return x["top"] + x["total"].log()


def _entropy(x: dict[str, Tensor]) -> Tensor:
    return x["total"].log() - x["weighted"] / x["total"]


def _logprob(x: dict[str, Tensor]) -> Tensor:
    return restore_infinity((x["picked"] - x["top"]) - x["total"].log())


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
