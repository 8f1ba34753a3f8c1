"""The largest logits of each row: exact ties, and the merge of slices and shards.

Equal logits are ordered by their ids. `torch.topk` does not promise that, but a stable sort of
entries in the order of their ids does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends.context import LossContext
from opsd_kernels.backends.logprob_terms import restore_infinity
from opsd_kernels.backends.passes import gathered
from opsd_kernels.problem import TopkProblem


class Largest(NamedTuple):
    """The largest logits of some rows, largest first, and what makes probabilities of them.

    A banned logit is `LOG_ZERO`: a shard pads with -inf, which is less.
    """

    logit: Tensor  # (rows, k)
    ids: Tensor  # (rows, k) int64, counted from the shard's first
    log_sum: Tensor  # (rows,) log-sum-exp of all logits, less the largest


def by_size(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (rows, k) at the ids, which ascend, and the ids, both from the largest logit on."""
    logit, order = z.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return logit, ids.gather(-1, order)


def largest_of(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(logits, ids) (rows, k) of the k largest of z (rows, V); reads the data on the host."""
    found = z.topk(k, -1)
    logit, ids = found.values, found.indices
    least = logit[:, -1:]
    # Rows with more entries equal to the least one than were taken: the lower ids are wanted.
    rows = ((z == least).sum(-1) > (logit == least).sum(-1)).nonzero().squeeze(-1)
    if len(rows):
        equal, above = z[rows] == least[rows], z[rows] > least[rows]
        equal &= equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)
        ids[rows] = (equal | above).nonzero()[:, 1].view(-1, k)
    return by_size(z, ids.sort(-1).values)


def merged(parts: Sequence[Largest], k: int) -> Largest:
    """The k largest of adjacent parts of the vocabulary, whose ids count from its first entry."""
    logit, order = torch.cat([x.logit for x in parts], -1).sort(
        dim=-1, descending=True, stable=True
    )
    ids = torch.cat([x.ids for x in parts], -1).gather(-1, order)
    sums = torch.stack([x.logit[:, 0] - logit[:, 0] + x.log_sum for x in parts])
    return Largest(logit[:, :k], ids[:, :k], sums.logsumexp(0))


def topk_of(
    run: LossContext, p: TopkProblem, parts: Iterable[Largest]
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, k), ids (N, k), lse (N,)) from those of successive kept rows."""
    tokens, shard = len(p.head.hidden), p.head.weight.shape[0]
    logprob = run.value.new_zeros(tokens, p.k)
    ids = logprob.new_full((tokens, p.k), p.ignore_index, dtype=torch.int64)
    if run.num_kept == 0:
        return logprob, ids, run.value
    shape = run.num_kept, min(p.k, shard)
    found = Largest(
        run.value.new_empty(shape), ids.new_empty(shape), run.value.new_empty(run.num_kept)
    )
    first = 0
    for part in parts:
        rows = slice(first, first + len(part.log_sum))
        for whole, values in zip(found, part, strict=True):
            whole[rows] = values
        first = rows.stop
    if run.group is not None:
        found = merged(_shards(found, p.k, run.offset, run.group), p.k)
    row_max = found.logit[:, 0]
    kept = slice(None) if run.kept is None else run.kept
    logprob[kept] = restore_infinity(found.logit - row_max[:, None] - found.log_sum[:, None])
    ids[kept] = found.ids
    run.value[kept] = row_max + found.log_sum
    return logprob, ids, run.value


def _shards(found: Largest, k: int, offset: int, group: dist.ProcessGroup) -> list[Largest]:
    """Every rank's largest logits, in the order of the vocabulary."""
    missing = (0, k - found.logit.shape[1])
    mine = (
        torch.nn.functional.pad(found.logit, missing, value=-torch.inf),
        torch.nn.functional.pad(found.ids + offset, missing),
        found.log_sum,
    )
    return [Largest(*x) for x in zip(*(gathered(y, group).unbind(1) for y in mine), strict=True)]
