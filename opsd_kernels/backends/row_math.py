"""Row arithmetic of both loss families on tiles of logits, in place, in fp32 (fp64 for fp64).

Every function takes tiles of shape (r, V) and returns columns of shape (r, 1). With a process
group the tile holds this rank's slice of the vocabulary, and columns are reduced over the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.backends.logprob_terms import restore_infinity
from opsd_kernels.problem import Head

Group = dist.ProcessGroup | None

# A finite stand-in for log 0: exp gives exactly 0, and differences of two of them do not overflow.
LOG_ZERO = -1e38


def reduce_columns(column: Tensor, op: str, group: Group) -> Tensor:
    """All-reduce a per-row column over the vocabulary shards; the identity without a group."""
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
    top = reduce_columns(z.amax(-1, keepdim=True), "MAX", group)
    z.sub_(top)
    torch.exp(z, out=prob)
    total = reduce_columns(prob.sum(-1, keepdim=True), "SUM", group)
    log_total = total.log()
    z.sub_(log_total).clamp_(min=LOG_ZERO)
    prob.div_(total)
    return top + log_total


def entropy(log_prob: Tensor, prob: Tensor, work: Tensor, group: Group) -> Tensor:
    """-sum p log p; `work` is left holding p log p."""
    return -_row_sum(torch.mul(log_prob, prob, out=work), group)


def pick(log_prob: Tensor, column: Tensor, offset: int, group: Group) -> Tensor:
    """log p of one vocabulary entry per row; the shard that owns the entry supplies it."""
    local = column - offset
    owned = (local >= 0) & (local < log_prob.shape[-1])
    picked = log_prob.gather(-1, torch.where(owned, local, 0))
    picked = reduce_columns(torch.where(owned, picked, 0), "SUM", group)
    return restore_infinity(picked)


def predict(z: Tensor, offset: int, group: Group) -> Tensor:
    """The entry of the largest logit, the first of equals; a float as other statistics are."""
    top, best = z.max(-1, keepdim=True)
    best = (best + offset).to(z.dtype)
    if group is not None:
        highest = reduce_columns(top.clone(), "MAX", group)
        best = reduce_columns(torch.where(top == highest, best, torch.inf), "MIN", group)
        best = torch.where(best < torch.inf, best, 0)  # a row of NaN has no maximum
    return best


def weighted_mean(
    log_prob: Tensor, class_weight: Tensor | None, vocab_size: int, group: Group
) -> tuple[Tensor, Tensor]:
    """(sum_v w_v log p(v) / V, sum_v w_v / V), the second () or (1,)."""
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
    """prob <- sharp onehot(y) + uniform w - mass p, the gradient of the value's logits."""
    sharp, mass = rates or [prob.new_ones(())] * 2
    grad = prob.mul_(-mass)
    if uniform != 0.0:
        grad.add_(uniform if class_weight is None else uniform * class_weight)
    local = target - offset
    owned = (local >= 0) & (local < prob.shape[-1])
    return grad.scatter_add_(-1, torch.where(owned, local, 0), torch.where(owned, sharp, 0))


def entropy_grad_(plogp: Tensor, prob: Tensor, entropy: Tensor) -> Tensor:
    """plogp <- -p (log p + entropy), the gradient of the entropy."""
    return plogp.addcmul_(prob, entropy).neg_()


def divergence_(
    log_s: Tensor,  # (r, V) becomes the gradient with respect to the student's logits
    s: Tensor,
    log_t: Tensor,  # overwritten
    t: Tensor,
    work: Tensor,  # overwritten
    *,
    beta: float,
    clip: float | None,
    want_grad: bool,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """Divergence and, with a clip, the mass it removed; kernels named by beta as in the docs."""
    if beta == 0.0:
        return _forward_kl_(log_s, s, log_t, t, clip, group)
    if beta == 1.0:
        return _reverse_kl_(log_s, s, log_t, clip, want_grad, work, group)
    return _jsd_(log_s, s, log_t, t, work, beta, clip, want_grad, group)


def _forward_kl_(
    log_s: Tensor,
    s: Tensor,
    log_t: Tensor,
    t: Tensor,
    clip: float | None,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """sum t log(t/s); gradient T s - t over the unclipped entries, T their teacher mass."""
    gap = log_t.sub_(log_s)
    infinite = _banned(gap, group)
    entries = gap.mul_(t)
    total = _row_sum(entries, group)
    if clip is None:
        torch.sub(s, t, out=log_s)
        return total.masked_fill_(infinite, torch.inf), None
    t.masked_fill_(entries > clip, 0)
    value = _row_sum(entries.clamp_(max=clip), group)
    torch.mul(s, _row_sum(t, group), out=log_s).sub_(t)
    return value, (total - value).masked_fill_(infinite, torch.inf)


def _reverse_kl_(
    log_s: Tensor,
    s: Tensor,
    log_t: Tensor,
    clip: float | None,
    want_grad: bool,
    work: Tensor,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """sum s log(s/t); gradient s (log(s/t) - value), or its form over the unclipped entries."""
    gap = log_s.sub_(log_t)
    infinite = _banned(gap, group)
    entries = gap.mul_(s)
    total = _row_sum(entries, group)
    if clip is None:
        if want_grad:
            # inf - inf has no direction; the infinite value reports it
            entries.addcmul_(s, total, value=-1).masked_fill_(infinite, 0)
        return total.masked_fill_(infinite, torch.inf), None
    over = entries > clip
    value = _row_sum(torch.clamp(entries, max=clip, out=work), group)
    if want_grad:
        entries.add_(s).masked_fill_(over, 0)
        entries.addcmul_(s, _row_sum(entries, group), value=-1)
    return value, (total - value).masked_fill_(infinite, torch.inf)


def _jsd_(
    log_s: Tensor,
    s: Tensor,
    log_t: Tensor,
    t: Tensor,
    work: Tensor,
    beta: float,
    clip: float | None,
    want_grad: bool,
    group: Group,
) -> tuple[Tensor, Tensor | None]:
    """beta KL(t|m) + (1-beta) KL(s|m), m = beta t + (1-beta) s.

    Gradient (1-beta) s (log(s/m) - K) with K = KL(s|m), both over the unclipped entries. With
    d = log(t/s), log(m/s) = log1p(beta expm1(d)): on close pairs the rounding of log s and log t
    then cancels to first order, which it does not through m itself.
    """
    limit = _log_ratio_limit(s.dtype)
    d = log_t.sub_(log_s).clamp_(min=-limit, max=limit)
    q = torch.expm1(d, out=work).mul_(beta).log1p_()
    student = torch.mul(q, s, out=log_s)  # -s log(s/m)
    teacher = d.sub_(q).mul_(t)
    removed = None
    if clip is None:
        k = _row_sum(student, group)
        value = beta * _row_sum(teacher, group) - (1 - beta) * k
    else:
        entries = teacher.mul_(beta).add_(student, alpha=beta - 1)
        total = _row_sum(entries, group)
        student.masked_fill_(entries > clip, 0)
        value = _row_sum(entries.clamp_(max=clip), group)
        removed = total - value
        k = _row_sum(student, group)
    if want_grad:
        student.addcmul_(s, k, value=-1).mul_(beta - 1)
    return value, removed


def _log_ratio_limit(dtype: torch.dtype) -> float:
    """Beyond it the smaller probability is nothing beside the larger, and expm1 still finite."""
    return 700.0 if dtype == torch.float64 else 80.0


def _row_sum(tile: Tensor, group: Group) -> Tensor:
    return reduce_columns(tile.sum(-1, keepdim=True), "SUM", group)


def _banned(gap: Tensor, group: Group) -> Tensor:
    """Rows where log p - log q met q = 0 < p, however faint p is."""
    return reduce_columns(gap.amax(-1, keepdim=True), "MAX", group) > -LOG_ZERO / 2
