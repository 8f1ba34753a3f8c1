"""Closed-form gradients of the losses with respect to z, the student's logits (..., V)."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_kernels.reference.rows import (
    entries,
    entropy,
    log_mixture,
    reverse_kl_entries,
    weighted_log_ratio,
)


def _through_softmax(g: Tensor, ls: Tensor) -> Tensor:
    """dz from g = dL / d log s."""
    return g - ls.exp() * g.sum(-1, keepdim=True)


def _unclipped(ls: Tensor, lt: Tensor, beta: float, token_clip: float | None) -> Tensor:
    """Mask of the entries that the clip leaves alone."""
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
    """The gradient of `divergence`."""
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
    s_log_s = weighted_log_ratio(ls, torch.zeros_like(ls))
    return -s_log_s - ls.exp() * entropy(ls).unsqueeze(-1)


def cross_entropy_grad(
    ls: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> Tensor:  # (..., V)
    """s - ((1 - eps) 1_y + eps / V)."""
    one_hot = torch.zeros_like(ls).scatter(-1, target.unsqueeze(-1), 1.0)
    return ls.exp() - (1 - label_smoothing) * one_hot - label_smoothing / ls.shape[-1]
