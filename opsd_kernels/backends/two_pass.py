"""Two-pass driver shared by the C++ and Triton backends.

For each block of rows: the first pass over the vocabulary makes the statistics of each row, the
second the sums of a JSD or of a clipped loss; then come the gradient of the logits and the products
that take it to the hidden states and the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.backends.context import same_head, store_stats
from opsd_kernels.backends.logprob_terms import rates_of, rates_with_lse, value_of
from opsd_kernels.backends.passes import (
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    BlockedPass,
    Gradient,
    HeadTiles,
    Layout,
    PairTiles,
    ResidentTiles,
    entropy_of,
    kl_of,
    logprob_of,
    lse_of,
)
from opsd_kernels.plan import Plan
from opsd_kernels.problem import (
    DIVERGENCE_STATS,
    LOGPROB_STATS,
    DivergenceProblem,
    GradsNeeded,
    Kept,
    LogprobProblem,
    Result,
)


@dataclass(frozen=True)
class _Passes:
    """The passes of a divergence over its logits."""

    layout: Layout
    first: Layout  # of the first pass
    summed: bool  # a second pass makes the value
    rounded: bool  # a second pass makes the gradient's constant from the rounded logits
    joined: Callable[..., Tensor] | None  # the second pass makes the gradient too
    resident: bool  # one pass makes everything

    @property
    def has_sums(self) -> bool:
        return self.summed or self.rounded


def _passes(p: DivergenceProblem, run: BlockedPass[Any]) -> _Passes:
    kind = {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(p.beta, JSD)
    layout = Layout(2, p.with_stats, False, p.with_stats and p.labels is not None, kind)
    joined = run.joined if kind == JSD and p.clip is None else None
    return _Passes(
        layout=layout,
        # The shares of a row are centered by its reverse KL, which the first pass then makes.
        first=layout if joined is None else replace(layout, kind=REVERSE_KL),
        summed=kind == JSD or p.clip is not None,
        # The constant in the gradient of rounded logits must be the value of the same logits.
        rounded=kind == REVERSE_KL and run.plan.precision == "difference" and run.needed.any,
        joined=joined,
        resident=p.clip is None and run.resident,
    )


def divergence(
    run_type: type[BlockedPass[Any]],
    p: DivergenceProblem,
    plan: Plan,
    row_scale: Tensor | None,
    needed: GradsNeeded,
    keeps: bool = False,
    kept: Kept | None = None,
) -> Result:
    """Divergence of each token; gradients of sum(row_scale * value), or of each value if None.

    keeps: the result holds the first block's logits; kept: those that a forward pass has kept.
    """
    run = run_type(p.student, plan, p.keep, needed, p.execution.group_name, row_scale)
    run.keeps = keeps
    run.go_on_from(kept)
    passes = _passes(p, run)
    merged = run.statistics(passes.first.count)
    sums = run.statistics((2 if p.clip is None else 3) if passes.has_sums else 0)
    for block in run.blocks():
        _divergence_block(p, run, passes, block, merged[:, block], sums)
    layout, infinite = passes.layout, None
    if layout.kind != JSD:
        value, infinite = kl_of(layout, merged)
    if passes.summed:
        value = sums[0]
    run.value[run.everything] = value
    stats = run.value.new_zeros(len(DIVERGENCE_STATS) if p.with_stats else 0, len(run.value))
    if not p.with_stats:
        return run.result(stats)
    columns = {}
    for index, name in enumerate(("student", "teacher")):
        head = layout.head(merged, index)
        columns[f"{name}_entropy"] = entropy_of(head)
        if layout.label:
            columns[f"{name}_logprob"] = logprob_of(head)
    if p.clip is not None:
        removed = sums[2] - sums[0]
        columns["clipped_mass"] = (
            removed if infinite is None else removed.masked_fill(infinite, torch.inf)
        )
    store_stats(stats, DIVERGENCE_STATS, run.everything, columns)
    return run.result(stats)


def _divergence_block(
    p: DivergenceProblem,
    run: BlockedPass[Any],
    passes: _Passes,
    block: slice,
    merged: Tensor,  # (K, rows) of this block
    sums: Tensor,  # (0, 2 or 3, rows) of all blocks
) -> None:
    """Fill the block's statistics and sums, and add its gradients."""
    heads, layout = [p.student, p.teacher], passes.layout
    again = passes.has_sums or run.needed.any or run.keeps_block(block)
    labels = run.optional_part(p.labels, block) if layout.label else None
    scale = run.optional_part(run.row_scale, block)
    if passes.resident:
        resident_tiles: ResidentTiles = run.tiles(heads, block, same_head(*heads), again)
        resident_tiles.resident(layout, labels, run.offset, merged, sums[:, block], p.beta, scale)
        run.gradients(block, resident_tiles, _already_there)
        return
    tiles: PairTiles = run.tiles(heads, block, same_head(*heads), again)
    run.statistics_of(tiles, passes.first, labels, block, merged)
    if passes.joined is not None:
        center = _mean_log_mixture(kl_of(passes.first, merged)[0], p.beta)
        sums[:, block] = passes.joined(block, tiles, layout, merged, center, p, scale)
        return
    if passes.has_sums:
        sums[:, block] = tiles.sums(layout, merged, p.beta, p.clip, run.group)
    if not run.needed.any:
        return
    sum_share = sums[1, block] if passes.has_sums else kl_of(layout, merged)[0]
    if passes.rounded:
        sum_share = sum_share.masked_fill(kl_of(layout, merged)[1], torch.inf)
    gradient = functools.partial(
        _divergence_gradient, tiles, layout, merged, sum_share, scale, p.beta, p.clip
    )
    run.gradients(block, tiles, gradient)


def _already_there(columns: slice, outs: list[Tensor]) -> None:
    """The gradient of a resident pass: it has been written over the logits."""


def _divergence_gradient(
    tiles: PairTiles,
    layout: Layout,
    merged: Tensor,
    sum_share: Tensor,
    scale: Tensor | None,
    beta: float,
    clip: float | None,
    columns: slice,
    outs: list[Tensor],
) -> None:
    tiles.divergence_gradient(layout, merged, sum_share, scale, beta, clip, columns, outs[0])


def logprob(
    run_type: type[BlockedPass[Any]],
    p: LogprobProblem,
    plan: Plan,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    lse_scale: Tensor | None,
    needed: GradsNeeded,
    keeps: bool = False,
    kept: Kept | None = None,
) -> Result:
    """Log-probability of each target; gradients as `divergence`, the entropy's separately."""
    group = p.execution.group_name
    scales = row_scale, entropy_scale, lse_scale
    run = run_type(p.head, plan, p.keep, needed, group, *scales, p.known)
    run.keeps = keeps
    run.go_on_from(kept)
    smoothed = p.label_smoothing != 0.0
    layout = Layout(1, p.with_entropy, smoothed, True, JSD, p.with_predicted)
    merged = run.statistics(layout.count)
    for block in run.blocks():
        _logprob_block(p, run, layout, block, merged[:, block])
    head, mean = layout.head(merged, 0), None
    value, lse = logprob_of(head), lse_of(head)
    if smoothed:
        mean = (head["sum_logit"] - head["sum_weight"] * head["sum_exp"].log()) / run.vocab_size
    weight = None if p.label_weight is None else p.label_weight[run.everything]
    run.value[run.everything] = value_of(p, value, weight, mean, lse)
    stats = run.value.new_zeros(len(LOGPROB_STATS), len(run.value))
    columns = {"logprob": value, "lse": lse}
    if p.with_entropy:
        columns["entropy"] = entropy_of(head)
    if p.with_predicted:  # a row of NaN has no maximum
        columns["predicted"] = torch.where(head["argmax"] < run.vocab_size, head["argmax"], 0)
    store_stats(stats, LOGPROB_STATS, run.everything, columns)
    return run.result(stats)


def _logprob_block(
    p: LogprobProblem, run: BlockedPass[Any], layout: Layout, block: slice, merged: Tensor
) -> None:
    """Fill the block's statistics (K, rows), and add its gradients."""
    again = run.needed.any or run.keeps_block(block)
    tiles: HeadTiles = run.tiles([p.head], block, False, again)
    target = run.part(p.target, block)
    run.statistics_of(tiles, layout, target, block, merged)
    rows = block if run.kept is None else run.kept[block]
    if run.known_logits is not None:
        run.known_logits[rows] = run.target_logits(tiles, rows)
    if not run.needed.any:
        return
    head = layout.head(merged, 0)
    has_entropy_grad = run.needed.entropy or run.entropy_scale is not None
    entropy = entropy_of(head) if has_entropy_grad else None
    scale = run.optional_part(run.row_scale, block)
    entropy_scale = run.optional_part(run.entropy_scale, block)
    lse_scale = run.optional_part(run.lse_scale, block)
    share = head["sum_weight"] / run.vocab_size if layout.smoothed else None
    rates = rates_of(p, run.optional_part(p.label_weight, block), share, lse_of(head))
    if lse_scale is not None and scale is not None:
        rates, scale = rates_with_lse(rates, scale, lse_scale), None
    gradient = functools.partial(
        tiles.logprob_gradient, target, merged, entropy, (scale, entropy_scale),
        None if rates is None else torch.stack(rates), p.label_smoothing / run.vocab_size,
        run.offset,
    )  # fmt: skip
    if p.known is not None:
        gradient = functools.partial(_with_known_entries, run, rows, gradient)
    run.gradients(block, tiles, gradient)


def _with_known_entries(
    run: BlockedPass[Any],
    rows: Tensor | slice,
    gradient: Gradient,
    columns: slice,
    outs: list[Tensor],
) -> None:
    """A slice's dz by `gradient`, then the entries that the caller has made."""
    gradient(columns, outs)
    ids, values = run.known_entries(rows, columns.start)
    run.store_entries(outs[0][:, : columns.stop - columns.start], ids, values)


def _mean_log_mixture(reverse_kl: Tensor, beta: float) -> Tensor:
    """log(m / s) where log(t / s) equals its mean under s: the center of a row's shares."""
    ratio = (-reverse_kl).clamp(min=-80.0)
    return torch.log1p(beta * torch.expm1(ratio))
