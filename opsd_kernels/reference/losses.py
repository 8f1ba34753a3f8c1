"""The public losses over full logits, with their masks, weights and sums."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from opsd_kernels.reference.rows import (
    clipped_mass,
    cross_entropy,
    divergence,
    entropy,
    log_probs,
    logits,
    logprob,
)


def kept_rows(
    shape: torch.Size,
    labels: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    device: torch.device,
) -> Tensor:  # (...) bool
    """Tokens that are neither ignored nor of weight 0."""
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    if labels is not None:
        keep = keep & (labels != ignore_index)
    if token_weight is not None:
        keep = keep & (token_weight != 0)
    return keep


def spread(values: Tensor, keep: Tensor) -> Tensor:
    """Values of the kept rows at their tokens (...) or (..., K), 0 elsewhere."""
    shape = (*keep.shape, *values.shape[1:])
    mask = keep.view((*keep.shape, *[1] * (values.ndim - 1)))
    return torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def reduce_tokens(
    values: Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """The loss from values (...) of each token, reduced as `fused_linear_jsd` says."""
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
    """`fused_linear_jsd` over full logits."""
    keep = kept_rows(
        student_input.shape[:-1], shift_labels, ignore_index, token_weight, student_input.device
    )
    head_log_probs = functools.partial(log_probs, temperature=temperature, vocab_size=vocab_size)
    ls = head_log_probs(
        student_input[keep],
        student_weight,
        student_bias,
        softcap=student_softcap,
        logit_scale=student_logit_scale,
    )
    lt = head_log_probs(
        teacher_input[keep],
        teacher_weight,
        teacher_bias,
        softcap=teacher_softcap,
        logit_scale=teacher_logit_scale,
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
    """`fused_linear_logprob` over full logits."""
    valid = target != ignore_index
    several = target.ndim == input.ndim
    keep = valid.any(-1) if several else valid
    ls = log_probs(
        input[keep],
        weight,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    if several:
        ids = torch.where(valid, target, 0)[keep]
        return torch.where(valid, spread(ls.gather(-1, ids), keep), 0.0)
    chosen = spread(logprob(ls, target[keep]), keep)
    return (chosen, spread(entropy(ls), keep)) if return_entropy else chosen


def linear_topk(
    input: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_linear_topk` over full logits: a stable sort has the lower of two equal ids first."""
    keep = kept_rows(input.shape[:-1], shift_labels, ignore_index, None, input.device)
    bias = None if bias is None else bias[:vocab_size]
    z = logits(
        input[keep],
        weight[:vocab_size],
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
    )
    top = z.argsort(dim=-1, descending=True, stable=True)[..., :k]
    logprob = spread(z.log_softmax(-1).gather(-1, top), keep)
    ids = torch.where(keep.unsqueeze(-1), spread(top, keep), ignore_index)
    return logprob, ids, spread(z.logsumexp(-1), keep)


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
    """`fused_linear_cross_entropy` over full logits."""
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
    """`fused_linear_advantage` over full logits."""
    keep = target != ignore_index
    head_log_probs = functools.partial(log_probs, temperature=temperature, vocab_size=vocab_size)
    ls = head_log_probs(
        student_input[keep],
        student_weight,
        student_bias,
        softcap=student_softcap,
        logit_scale=student_logit_scale,
    )
    lt = head_log_probs(
        teacher_input[keep],
        teacher_weight,
        teacher_bias,
        softcap=teacher_softcap,
        logit_scale=teacher_logit_scale,
    )
    student_logprob = spread(logprob(ls, target[keep]), keep)
    teacher_logprob = spread(logprob(lt, target[keep]), keep)
    return (teacher_logprob - student_logprob).detach(), student_logprob
