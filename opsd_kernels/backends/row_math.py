"""Row arithmetic of the PyTorch backend: both loss families on tiles of logits, in place.

Tiles are (r, V), results per row (r, 1), in fp32 (fp64 for fp64 inputs). With a process group a
tile holds this rank's shard of the vocabulary, and results per row are reduced over the group.
Functions that end in _ overwrite arguments.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends.logprob_terms import restore_infinity
from opsd_kernels.problem import Head

Group = dist.ProcessGroup | None

# Finite, in place of log 0: its exp is exactly 0, and the difference of two does not overflow.
LOG_ZERO = -1e38


def reduce_columns(column: Tensor, op: str, group: Group) -> Tensor:
    """All-reduce a result per row over the vocabulary shards; a no-op without a group."""
    if group is not None:
        dist.all_reduce(column, getattr(dist.ReduceOp, op), group=group)
    return column


def to_logits_(
    z: Tensor,  # (r, V) raw products, overwritten
    head: Head,
    slope: Tensor | None,  # (r, V) receives d softcap / d raw
) -> None:
    """z <- softcap(z + bias) / temperature of the head."""
    softcap = head.softcap
    if head.bias is not None:
        z.add_(head.bias)
    if softcap is not None:
        z.div_(softcap).tanh_()
        if slope is not None:
            torch.mul(z, z, out=slope).neg_().add_(1)
        z.mul_(softcap)
    if head.temperature != 1.0:
        z.div_(head.temperature)


def log_softmax_(z: Tensor, prob: Tensor, group: Group) -> Tensor:
    """z <- log softmax(z), prob <- softmax(z); returns the log-sum-exp."""
    row_max = reduce_columns(z.amax(-1, keepdim=True), "MAX", group)
    z.sub_(row_max)
    torch.exp(z, out=prob)
    sum_exp = reduce_columns(prob.sum(-1, keepdim=True), "SUM", group)
    log_sum = sum_exp.log()
    z.sub_(log_sum).clamp_(min=LOG_ZERO)
    prob.div_(sum_exp)
    return row_max + log_sum


def entropy(log_prob: Tensor, prob: Tensor, work: Tensor, group: Group) -> Tensor:
    """-sum p log p; leaves p log p in `work`."""
    return -_row_sum(torch.mul(log_prob, prob, out=work), group)


def logits_at(z: Tensor, ids: Tensor) -> Tensor:
    """(rows, K) entries of z (rows, V) at the ids (rows, K); 0 outside."""
    owned = (ids >= 0) & (ids < z.shape[-1])
    return torch.where(owned, z.gather(-1, torch.where(owned, ids, 0)), 0)


def gather_label(log_prob: Tensor, label: Tensor, offset: int, group: Group) -> Tensor:
    """log p of each row's label, from the shard that holds it."""
    found = logits_at(log_prob, label - offset)
    return restore_infinity(reduce_columns(found, "SUM", group))


def argmax(z: Tensor, offset: int, group: Group) -> Tensor:
    """First column of the row's maximum, as a float like the other statistics."""
    row_max, found = z.max(-1, keepdim=True)
    found = (found + offset).to(z.dtype)
    if group is not None:
        highest = reduce_columns(row_max.clone(), "MAX", group)
        found = reduce_columns(torch.where(row_max == highest, found, torch.inf), "MIN", group)
        found = torch.where(found < torch.inf, found, 0)  # a row of NaN has no maximum
    return found


def weighted_mean(
    log_prob: Tensor, class_weight: Tensor | None, vocab_size: int, group: Group
) -> tuple[Tensor, Tensor]:
    """(sum_v w_v log p(v) / V, sum_v w_v / V), V the whole vocabulary; the second () or (1,)."""
    if class_weight is None:
        return _row_sum(log_prob / vocab_size, group), log_prob.new_ones(())
    share = _row_sum(class_weight / vocab_size, group)
    return _row_sum(log_prob * (class_weight / vocab_size), group), share


def logprob_grad_(
    prob: Tensor,
    target: Tensor,
    rates: tuple[Tensor, Tensor] | None,
    uniform: float,
    class_weight: Tensor | None,
    offset: int,
) -> Tensor:
    """prob <- sharp onehot(y) + uniform w - mass p, the gradient of `logprob_terms`."""
    sharp, mass = rates or (prob.new_ones(()),) * 2
    grad = prob.mul_(-mass)
    if uniform != 0.0:
        grad.add_(uniform if class_weight is None else uniform * class_weight)
    local = target - offset
    owned = (local >= 0) & (local < prob.shape[-1])
    return grad.scatter_add_(-1, torch.where(owned, local, 0), torch.where(owned, sharp, 0))


def entropy_grad_(p_log_p: Tensor, prob: Tensor, entropy: Tensor) -> Tensor:
    """p_log_p <- -p (log p + entropy), the gradient of the entropy."""
    return p_log_p.addcmul_(prob, entropy).neg_()


def divergence_(
    log_s: Tensor,  # (r, V) becomes the gradient with respect to the student's logits
    s: Tensor,
    log_t: Tensor,  # overwritten
    t: Tensor,
    work: Tensor,  # overwritten
    *,
    beta: float,
    clip: float | None,
    needs_grad: bool,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """Divergence and, with a clip, the mass it removed; beta 0 is the forward, 1 the reverse KL."""
    if beta == 0.0:
        return _forward_kl_(log_s, s, log_t, t, clip, group)
    if beta == 1.0:
        return _reverse_kl_(log_s, s, log_t, clip, needs_grad, work, group)
    return _jsd_(log_s, s, log_t, t, work, beta, clip, needs_grad, group)


def _forward_kl_(
    log_s: Tensor,
    s: Tensor,
    log_t: Tensor,
    t: Tensor,
    clip: float | None,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """sum t log(t/s); gradient T s - t over the unclipped entries, T the teacher's mass on them."""
    gap = log_t.sub_(log_s)
    infinite = _is_infinite(gap, group)
    entries = gap.mul_(t)
    unclipped = _row_sum(entries, group)
    if clip is None:
        torch.sub(s, t, out=log_s)
        return unclipped.masked_fill_(infinite, torch.inf), None
    t.masked_fill_(entries > clip, 0)
    value = _row_sum(entries.clamp_(max=clip), group)
    torch.mul(s, _row_sum(t, group), out=log_s).sub_(t)
    return value, (unclipped - value).masked_fill_(infinite, torch.inf)


def _reverse_kl_(
    log_s: Tensor,
    s: Tensor,
    log_t: Tensor,
    clip: float | None,
    needs_grad: bool,
    work: Tensor,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """sum s log(s/t); gradient s (log(s/t) - value).

    With a clip it is g - s sum(g), g = s log(s/t) + s on the unclipped entries, 0 elsewhere.
    """
    gap = log_s.sub_(log_t)
    infinite = _is_infinite(gap, group)
    entries = gap.mul_(s)
    unclipped = _row_sum(entries, group)
    if clip is None:
        if needs_grad:
            # An infinite KL has no gradient (inf - inf); the value reports it.
            entries.addcmul_(s, unclipped, value=-1).masked_fill_(infinite, 0)
        return unclipped.masked_fill_(infinite, torch.inf), None
    over = entries > clip
    value = _row_sum(torch.clamp(entries, max=clip, out=work), group)
    if needs_grad:
        entries.add_(s).masked_fill_(over, 0)
        entries.addcmul_(s, _row_sum(entries, group), value=-1)
    return value, (unclipped - value).masked_fill_(infinite, torch.inf)


def _jsd_(
    log_s: Tensor,
    s: Tensor,
    log_t: Tensor,
    t: Tensor,
    work: Tensor,
    beta: float,
    clip: float | None,
    needs_grad: bool,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """beta KL(t|m) + (1-beta) KL(s|m), m = beta t + (1-beta) s.

    Gradient (1-beta) s (log(s/m) - K) with K = KL(s|m), both over the unclipped entries. With
    d = log(t/s), log(m/s) = log1p(beta expm1(d)): on close pairs the rounding of log s and log t
    then cancels to first order; computed from m it would not.
    """
    limit = _log_ratio_limit(s.dtype)
    d = log_t.sub_(log_s).clamp_(min=-limit, max=limit)
    log_m_s = torch.expm1(d, out=work).mul_(beta).log1p_()
    student = torch.mul(log_m_s, s, out=log_s)  # s log(m/s)
    teacher = d.sub_(log_m_s).mul_(t)
    removed = None
    if clip is None:
        k = _row_sum(student, group)
        value = beta * _row_sum(teacher, group) - (1 - beta) * k
    else:
        entries = teacher.mul_(beta).add_(student, alpha=beta - 1)
        unclipped = _row_sum(entries, group)
        student.masked_fill_(entries > clip, 0)
        value = _row_sum(entries.clamp_(max=clip), group)
        removed = unclipped - value
        k = _row_sum(student, group)
    if needs_grad:
        student.addcmul_(s, k, value=-1).mul_(beta - 1)
    return value, removed


def _log_ratio_limit(dtype: torch.dtype) -> float:
    """Bound of log(t/s): the smaller probability is negligible there, and expm1 still finite."""
    return 700.0 if dtype == torch.float64 else 80.0


def _row_sum(tile: Tensor, group: Group) -> Tensor:
    return reduce_columns(tile.sum(-1, keepdim=True), "SUM", group)


def _is_infinite(gap: Tensor, group: Group) -> Tensor:
    """Rows whose gap, log p - log q, contains q = 0 < p, however small p is: the KL is infinite."""
    return reduce_columns(gap.amax(-1, keepdim=True), "MAX", group) > -LOG_ZERO / 2
