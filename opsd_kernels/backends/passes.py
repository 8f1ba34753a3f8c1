"""What the two-pass driver asks of a backend: blocks of rows, their tiles, and row statistics.

The C++ and Triton backends each subclass `BlockedPass`, whose `tiles` meet the protocols below.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends.context import LossContext
from opsd_kernels.backends.logprob_terms import restore_infinity
from opsd_kernels.layouts import even_blocks
from opsd_kernels.problem import Head, Kept, Result

FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
# Writes dz of the given columns, and the entropy's dz if there is a second buffer.
Gradient = Callable[[slice, list[Tensor]], None]
AnyTiles = TypeVar("AnyTiles")


@dataclass(frozen=True)
class Layout:
    """Which statistics a pass makes, and their order among the rows of its result (K, rows).

    With u = z - row_max: sum_exp is sum exp(u), sum_exp_logit is sum u exp(u), sum_logit is
    sum w u and sum_weight is sum w over class weights w. A KL adds two rows after both heads':
    cross = sum exp(u_p) (u_p - u_q), and whether the KL is infinite.
    """

    heads: int
    entropy: bool
    smoothed: bool
    label: bool
    kind: int  # JSD if there is no cross row
    predicted: bool = False  # of one head

    @property
    def names(self) -> list[str]:
        """Statistics of one head, in the order in which they are stored."""
        names = ["row_max", "sum_exp"] + ["sum_exp_logit"] * self.entropy
        names += ["sum_logit", "sum_weight"] * self.smoothed + ["label_logit"] * self.label
        return names + ["argmax"] * self.predicted

    @property
    def count(self) -> int:
        """Rows of the statistics of all heads, with `cross` and `infinite` of a KL."""
        return self.heads * len(self.names) + 2 * (self.heads == 2 and self.kind != JSD)

    def head(self, merged: Tensor, index: int) -> dict[str, Tensor]:
        """One head's statistics by name, each (rows,), from `merged` (count, rows)."""
        rows = merged[index * len(self.names) : (index + 1) * len(self.names)]
        return dict(zip(self.names, rows, strict=True))


def lse_of(x: dict[str, Tensor]) -> Tensor:
    """Log-sum-exp of each row, (rows,)."""
    return x["row_max"] + x["sum_exp"].log()


def entropy_of(x: dict[str, Tensor]) -> Tensor:
    """Entropy of each row in nats, (rows,)."""
    return x["sum_exp"].log() - x["sum_exp_logit"] / x["sum_exp"]


def logprob_of(x: dict[str, Tensor]) -> Tensor:
    """Log-probability of the label of each row, (rows,)."""
    return restore_infinity((x["label_logit"] - x["row_max"]) - x["sum_exp"].log())


def kl_of(layout: Layout, merged: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || q), where it is infinite) from the statistics of one pass.

    KL = cross / sum_exp_p - log(sum_exp_p / sum_exp_q), p the teacher for the forward KL.
    """
    sum_exp = [layout.head(merged, i)["sum_exp"] for i in range(2)]
    sum_p, sum_q = sum_exp if layout.kind == REVERSE_KL else sum_exp[::-1]
    cross, infinite = merged[-2], merged[-1] > 0
    return (cross / sum_p - (sum_p / sum_q).log()).masked_fill(infinite, torch.inf), infinite


class BlockedPass(LossContext, ABC, Generic[AnyTiles]):
    """Blocks of rows of one call; a backend adds its type of tiles and the products with dz."""

    keeps = False  # the first block's logits stay in the workspace for backward
    kept_logits: Kept | None = None  # those, or in backward those of the forward pass

    @property
    def everything(self) -> Tensor | slice:
        """Index of the kept rows."""
        return slice(None) if self.kept is None else self.kept

    def blocks(self) -> list[slice]:
        """Blocks of the kept rows, counted among the kept ones.

        The first is the last where its logits stay in the workspace.
        """
        sizes = even_blocks(self.num_kept, self.plan.rows_per_block)
        ends = itertools.accumulate(sizes)
        found = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        return found[::-1] if self.keeps else found

    def result(self, stats: Tensor) -> Result:
        """As the base class, with the logits that backward goes on from."""
        found = super().result(stats)
        found.kept = self.kept_logits if self.keeps else None
        return found

    def part(self, values: Tensor, block: slice) -> Tensor:
        """The block's rows of a tensor with one row per token."""
        return values[block] if self.kept is None else values[self.kept[block]]

    def optional_part(self, values: Tensor | None, block: slice) -> Tensor | None:
        """`part` of these values; None where there are none."""
        return None if values is None else self.part(values, block)

    def statistics(self, count: int) -> Tensor:
        """Uninitialized (count, kept rows)."""
        return self.value.new_empty(count, self.num_kept)

    @property
    def joined(self) -> Callable[..., Tensor] | None:
        """Makes the sums of a JSD and its gradient from the same logits, if that saves a pass.

        Called with (block, tiles, layout, merged, center, problem, scale); fills the block's
        gradient and returns (2, rows): value and sum of the shares minus `center`.
        """
        return None

    @property
    def resident(self) -> bool:
        """Whether the tiles are `ResidentTiles`: statistics, sums and dz in one pass."""
        return False

    @abstractmethod
    def tiles(self, heads: list[Head], block: slice, shared: bool, again: bool) -> AnyTiles:
        """The block's tiles of one or two heads; `again`: a later pass reads the logits."""

    @abstractmethod
    def gradients(self, block: slice, tiles: AnyTiles, gradient: Gradient) -> None:
        """Make every slice's dz by `gradient(columns, outs)` and multiply it into the gradients."""

    @abstractmethod
    def store_entries(self, dz: Tensor, ids: Tensor, values: Tensor) -> None:
        """dz[row, ids[row, k]] = values[row, k] (rows, K), where dz (rows, columns) has the id."""

    @abstractmethod
    def target_logits(self, tiles: AnyTiles, rows: Tensor | slice) -> Tensor:
        """(rows, K) logits z of a block's known entries, once it has statistics; 0 outside."""

    def keeps_block(self, block: slice) -> bool:
        """Whether this block's logits stay for backward."""
        return self.keeps and block.start == 0

    def go_on_from(self, kept: Kept | None) -> None:
        """Take over the logits of the forward pass, and the memory for all others."""
        if kept is not None:
            self.kept_logits = kept
            self.buffers["logits"] = kept.logits.flatten(0, 1)

    def statistics_of(
        self,
        tiles: HeadTiles | PairTiles,
        layout: Layout,
        labels: Tensor | None,
        block: slice,
        merged: Tensor,  # (K, rows) of this block
    ) -> None:
        """Fill `merged`, or copy it where the forward pass has kept it."""
        if not self.keeps and self.kept_logits is not None and block == self.kept_logits.block:
            merged.copy_(self.kept_logits.merged)
            return
        tiles.statistics(layout, labels, self.offset, merged, self.group)
        if self.keeps_block(block):
            self.kept_logits = Kept(self.plan, block, tiles.logits, merged)

    def buffer(
        self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(rows, columns), allocated once for all blocks; the first block is the largest."""
        if name not in self.buffers:
            self.buffers[name] = self.head.hidden.new_empty(rows, columns, dtype=dtype)
        return self.buffers[name][:rows]


class _StatisticsTiles(Protocol):
    logits: Tensor  # (heads, rows, V) where a later pass reads them

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Fill `out` (K, rows), a view of any row stride, with the statistics of this block."""


class PairTiles(_StatisticsTiles, Protocol):
    """The logits of a block of rows of two heads, tile by tile."""

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2 or 3, rows): value, sum of shares and, with a clip, the unclipped value."""

    def divergence_gradient(
        self,
        layout: Layout,
        merged: Tensor,
        sum_share: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        columns: slice,
        out: Tensor,
    ) -> None:
        """d value / d raw logits of the student, times scale, into `out` (rows, columns)."""


class ResidentTiles(Protocol):
    """Tiles of two heads whose one pass makes statistics, sums and gradient."""

    def resident(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        sums: Tensor,
        beta: float,
        scale: Tensor | None,
    ) -> None:
        """dz over the student's logits; a JSD's value and sum of shares into `sums` (2, rows).

        Statistics into `out` (K, rows) for a KL, and where the layout has entropies or labels.
        """


class HeadTiles(_StatisticsTiles, Protocol):
    """The logits of a block of rows of one head, tile by tile."""

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
        """d value / d raw logits into outs[0] (rows, columns), the entropy's into outs[1] if any.

        rates (2, rows): sharp and mass of `logprob_terms`, None for 1.
        """


def gathered(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's statistics (K, rows) as (K, ranks, rows), to be merged in rank order."""
    mine = out.contiguous()
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return torch.stack(every, 1)
