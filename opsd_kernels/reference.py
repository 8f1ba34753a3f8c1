"""The truth: every loss and gradient of the package written plainly over full logits.

Nothing here is fast and nothing here is called by an operator. The functions keep the dtype they
are given: float64 inputs make them the truth, bfloat16 inputs make them what a user would write by
hand. `ls` and `lt` are log-probabilities of student and teacher, (..., V), student first.

Banned entries are -inf, and 0 * log 0 = 0 in the value and in autograd. Each torch.where therefore
also replaces the operands it does not want, or their gradient would be 0 * inf = NaN.
"""

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


# ----------------------------------------------------------------------------- from hidden to log p


def logits(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:  # (..., V)
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:  # (..., V)
    """log_softmax of the logits over the first `vocab_size` rows of the head."""
    weight = weight[:vocab_size]
    bias = None if bias is None else bias[:vocab_size]
    head = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    return logits(hidden, weight, bias, **head).log_softmax(-1)


# -------------------------------------------------------------------------------------- divergences


def weighted_log_ratio(lp: Tensor, lq: Tensor) -> Tensor:
    """p (log p - log q) entry by entry; 0 where p = 0, +inf where q = 0 < p."""
    live = lp > NEG_INF
    lp = torch.where(live, lp, 0.0)
    lq = torch.where(live, lq, 0.0)
    return torch.where(live, lp.exp() * (lp - lq), 0.0)


def log_mixture(ls: Tensor, lt: Tensor, beta: float) -> Tensor:
    """log m with m = beta t + (1 - beta) s."""
    live = (ls > NEG_INF) | (lt > NEG_INF)
    ls = torch.where(live, ls, 0.0)
    lt = torch.where(live, lt, 0.0)
    return torch.where(live, torch.logaddexp(lt + math.log(beta), ls + math.log1p(-beta)), NEG_INF)


def forward_kl_entries(ls: Tensor, lt: Tensor) -> Tensor:
    return weighted_log_ratio(lt, ls)


def reverse_kl_entries(ls: Tensor, lt: Tensor) -> Tensor:
    return weighted_log_ratio(ls, lt)


def jsd_entries(ls: Tensor, lt: Tensor, beta: float) -> Tensor:
    lm = log_mixture(ls, lt, beta)
    return beta * weighted_log_ratio(lt, lm) + (1 - beta) * weighted_log_ratio(ls, lm)


def entries(ls: Tensor, lt: Tensor, beta: float) -> Tensor:
    """Each vocabulary entry's share; beta 0 and 1 are the two KLs, not the limits of the JSD."""
    if beta == 0:
        return forward_kl_entries(ls, lt)
    if beta == 1:
        return reverse_kl_entries(ls, lt)
    return jsd_entries(ls, lt, beta)


def clipped_entries(ls: Tensor, lt: Tensor, beta: float, token_clip: float) -> Tensor:
    """min(entry, token_clip); the gradient is 0 at clipped entries, infinite ones included."""
    clipped = entries(ls.detach(), lt.detach(), beta) > token_clip
    inside = entries(torch.where(clipped, 0.0, ls), torch.where(clipped, 0.0, lt), beta)
    return torch.where(clipped, token_clip, inside)


def forward_kl(ls: Tensor, lt: Tensor, token_clip: float | None = None) -> Tensor:  # (...)
    """KL(t || s) = sum of t (log t - log s)."""
    return divergence(ls, lt, 0.0, token_clip)


def reverse_kl(ls: Tensor, lt: Tensor, token_clip: float | None = None) -> Tensor:  # (...)
    """KL(s || t) = sum of s (log s - log t)."""
    return divergence(ls, lt, 1.0, token_clip)


def jsd(ls: Tensor, lt: Tensor, beta: float, token_clip: float | None = None) -> Tensor:  # (...)
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s, for 0 < beta < 1."""
    assert 0 < beta < 1
    return divergence(ls, lt, beta, token_clip)


def divergence(
    ls: Tensor, lt: Tensor, beta: float, token_clip: float | None = None
) -> Tensor:  # (...)
    if token_clip is None:
        return entries(ls, lt, beta).sum(-1)
    return clipped_entries(ls, lt, beta, token_clip).sum(-1)


def clipped_mass(ls: Tensor, lt: Tensor, beta: float, token_clip: float) -> Tensor:  # (...)
    """What the clip took away: divergence without clip = divergence with clip + clipped_mass."""
    return (entries(ls, lt, beta) - token_clip).clamp(min=0).sum(-1)


# --------------------------------------------------------------------------------- one distribution


def logprob(ls: Tensor, target: Tensor) -> Tensor:  # (...)
    return ls.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def entropy(ls: Tensor) -> Tensor:  # (...)
    return -weighted_log_ratio(ls, torch.zeros_like(ls)).sum(-1)


def cross_entropy(ls: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:  # (...)
    """Per token, unreduced; label_smoothing spreads its share evenly over the vocabulary."""
    hard = -logprob(ls, target)
    if label_smoothing == 0:
        return hard
    return (1 - label_smoothing) * hard - label_smoothing * ls.mean(-1)


def advantage(ls: Tensor, lt: Tensor, target: Tensor) -> Tensor:  # (...)
    """How much more the teacher likes the sampled token, detached."""
    return (logprob(lt, target) - logprob(ls, target)).detach()


# ------------------------- closed-form gradients wrt z, the student's logits


def _through_softmax(g: Tensor, ls: Tensor) -> Tensor:
    """dz from g = dL / d log s."""
    return g - ls.exp() * g.sum(-1, keepdim=True)


def _unclipped(ls: Tensor, lt: Tensor, beta: float, token_clip: float | None) -> Tensor:
    values = entries(ls, lt, beta)
    return torch.ones_like(values, dtype=torch.bool) if token_clip is None else values <= token_clip


def forward_kl_grad(ls: Tensor, lt: Tensor, token_clip: float | None = None) -> Tensor:  # (..., V)
    """s - t; with a clip T_U s - t 1_U, T_U the teacher's mass on the unclipped entries U."""
    t = torch.where(_unclipped(ls, lt, 0.0, token_clip), lt.exp(), 0.0)
    return t.sum(-1, keepdim=True) * ls.exp() - t


def reverse_kl_grad(ls: Tensor, lt: Tensor, token_clip: float | None = None) -> Tensor:  # (..., V)
    """s (log s - log t - L); with a clip g - s sum(g), g = (entry + s) on the unclipped entries."""
    g = reverse_kl_entries(ls, lt) + ls.exp()
    return _through_softmax(torch.where(_unclipped(ls, lt, 1.0, token_clip), g, 0.0), ls)


def jsd_grad(
    ls: Tensor, lt: Tensor, beta: float, token_clip: float | None = None
) -> Tensor:  # (..., V)
    """(1 - beta) s (log(s / m) - K), K = KL(s || m); with a clip the sums skip clipped entries."""
    g = (1 - beta) * weighted_log_ratio(ls, log_mixture(ls, lt, beta))
    return _through_softmax(torch.where(_unclipped(ls, lt, beta, token_clip), g, 0.0), ls)


def divergence_grad(ls: Tensor, lt: Tensor, beta: float, token_clip: float | None = None) -> Tensor:
    if beta == 0:
        return forward_kl_grad(ls, lt, token_clip)
    if beta == 1:
        return reverse_kl_grad(ls, lt, token_clip)
    return jsd_grad(ls, lt, beta, token_clip)


def logprob_grad(ls: Tensor, target: Tensor) -> Tensor:  # (..., V)
    """1_y - s."""
    return torch.zeros_like(ls).scatter(-1, target.unsqueeze(-1), 1.0) - ls.exp()


def entropy_grad(ls: Tensor) -> Tensor:  # (..., V)
    """-s (log s + H)."""
    weighted = weighted_log_ratio(ls, torch.zeros_like(ls))
    return -weighted - ls.exp() * entropy(ls).unsqueeze(-1)


def cross_entropy_grad(
    ls: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> Tensor:  # (..., V)
    """s - ((1 - eps) 1_y + eps / V)."""
    one_hot = torch.zeros_like(ls).scatter(-1, target.unsqueeze(-1), 1.0)
    return ls.exp() - (1 - label_smoothing) * one_hot - label_smoothing / ls.shape[-1]


# ------------------------------------------------- the public operations, with their masks and sums


def kept_rows(
    shape: torch.Size,
    labels: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    device: torch.device,
) -> Tensor:  # (...) bool
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    if labels is not None:
        keep = keep & (labels != ignore_index)
    if token_weight is not None:
        keep = keep & (token_weight != 0)
    return keep


def spread(values: Tensor, keep: Tensor) -> Tensor:
    """Values of the kept rows back at their places, 0 elsewhere."""
    return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(
        keep, values
    )


def reduce_tokens(
    values: Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    keep = kept_rows(values.shape, labels, ignore_index, None, values.device)
    if token_weight is not None:
        values = values * token_weight.to(values.dtype)
    values = torch.where(keep, values, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    divisor = max(int(keep.sum()), 1) if num_tokens is None else float(num_tokens)
    return values.sum() / divisor


def linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    token_clip: float | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    keep = kept_rows(
        student_input.shape[:-1], shift_labels, ignore_index, token_weight, student_input.device
    )
    shared = {"temperature": temperature, "vocab_size": vocab_size}
    ls = log_probs(
        student_input[keep],
        student_weight,
        student_bias,
        softcap=student_softcap,
        logit_scale=student_logit_scale,
        **shared,
    )
    lt = log_probs(
        teacher_input[keep],
        teacher_weight,
        teacher_bias,
        softcap=teacher_softcap,
        logit_scale=teacher_logit_scale,
        **shared,
    ).detach()
    loss = reduce_tokens(
        spread(divergence(ls, lt, beta, token_clip), keep),
        shift_labels,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_tokens=num_tokens,
    )
    if not return_stats:
        return loss
    ls = ls.detach()
    stats = {
        "divergence": divergence(ls, lt, beta, token_clip),
        "student_entropy": entropy(ls),
        "teacher_entropy": entropy(lt),
    }
    if shift_labels is not None:
        stats["student_logprob"] = logprob(ls, shift_labels[keep])
        stats["teacher_logprob"] = logprob(lt, shift_labels[keep])
    if token_clip is not None:
        stats["clipped_mass"] = clipped_mass(ls, lt, beta, token_clip)
    return loss, {name: spread(value, keep) for name, value in stats.items()}


def linear_logprob(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    keep = target != ignore_index
    ls = log_probs(
        input[keep],
        weight,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    chosen = spread(logprob(ls, target[keep]), keep)
    return (chosen, spread(entropy(ls), keep)) if return_entropy else chosen


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    keep = kept_rows(input.shape[:-1], target, ignore_index, token_weight, input.device)
    ls = log_probs(
        input[keep],
        weight,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    return reduce_tokens(
        spread(cross_entropy(ls, target[keep], label_smoothing), keep),
        target,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_tokens=num_tokens,
    )


def linear_advantage(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    shared = {"temperature": temperature, "ignore_index": ignore_index, "vocab_size": vocab_size}
    mine = linear_logprob(
        student_input,
        student_weight,
        target,
        bias=student_bias,
        softcap=student_softcap,
        logit_scale=student_logit_scale,
        **shared,
    )
    theirs = linear_logprob(
        teacher_input,
        teacher_weight,
        target,
        bias=teacher_bias,
        softcap=teacher_softcap,
        logit_scale=teacher_logit_scale,
        **shared,
    )
    return (theirs - mine).detach(), mine
