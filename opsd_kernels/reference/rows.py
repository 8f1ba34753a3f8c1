"""Losses of each row as functions of log-probabilities (..., V)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def logits(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:  # (..., V)
    """softcap(logit_scale * (hidden @ weight.T + bias)) / temperature."""
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
    z = logits(
        hidden, weight, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature
    )
    return z.log_softmax(-1)


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
    """t (log t - log s)."""
    return weighted_log_ratio(lt, ls)


def reverse_kl_entries(ls: Tensor, lt: Tensor) -> Tensor:
    """s (log s - log t)."""
    return weighted_log_ratio(ls, lt)


def jsd_entries(ls: Tensor, lt: Tensor, beta: float) -> Tensor:
    """beta t (log t - log m) + (1 - beta) s (log s - log m)."""
    lm = log_mixture(ls, lt, beta)
    return beta * weighted_log_ratio(lt, lm) + (1 - beta) * weighted_log_ratio(ls, lm)


def entries(ls: Tensor, lt: Tensor, beta: float) -> Tensor:
    """The divergence of each vocabulary entry; beta 0 and 1 are the KLs, not limits of the JSD."""
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
    """Sum of the entries, clipped if there is a clip."""
    if token_clip is None:
        return entries(ls, lt, beta).sum(-1)
    return clipped_entries(ls, lt, beta, token_clip).sum(-1)


def clipped_mass(ls: Tensor, lt: Tensor, beta: float, token_clip: float) -> Tensor:  # (...)
    """Divergence without the clip minus divergence with it."""
    return (entries(ls, lt, beta) - token_clip).clamp(min=0).sum(-1)


def logprob(ls: Tensor, target: Tensor) -> Tensor:  # (...)
    """log s(target)."""
    return ls.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def entropy(ls: Tensor) -> Tensor:  # (...)
    """-sum of s log s."""
    return -weighted_log_ratio(ls, torch.zeros_like(ls)).sum(-1)


def cross_entropy(ls: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:  # (...)
    """-(1 - e) log s(target) - e mean(log s), with e the label smoothing."""
    hard = -logprob(ls, target)
    if label_smoothing == 0:
        return hard
    return (1 - label_smoothing) * hard - label_smoothing * ls.mean(-1)


def advantage(ls: Tensor, lt: Tensor, target: Tensor) -> Tensor:  # (...)
    """log t(target) - log s(target), detached."""
    return (logprob(lt, target) - logprob(ls, target)).detach()
