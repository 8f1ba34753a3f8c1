"""Loss functions of TRL's that take logits, on hidden states and the head instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.integrations.heads import LmHead


@dataclass(frozen=True)
class HeadInput:
    """Stands for the temperature-scaled logits (B, K, V) of the hidden states (B, K, D)."""

    hidden: Tensor
    head: LmHead
    temperature: float
    keep: Tensor  # (B, K) bool: the tokens whose values are used; those of the others are 0

    def sum(self) -> Tensor:
        """A scalar that depends on the model; TRL multiplies it by 0 where nothing is to learn."""
        return self.hidden.sum()


def pair_arguments(student: Tensor, s: LmHead, teacher: Tensor, t: LmHead) -> dict[str, Any]:
    """Arguments of `fused_linear_jsd` for hidden states (..., D) and heads of two models."""
    student, student_weight, student_bias = _one_dtype(student, s)
    teacher, teacher_weight, teacher_bias = _one_dtype(teacher, t)
    return {
        "student_input": student,
        "student_weight": student_weight,
        "teacher_input": teacher,
        "teacher_weight": teacher_weight,
        "student_bias": student_bias,
        "teacher_bias": teacher_bias,
        "student_softcap": s.softcap,
        "teacher_softcap": t.softcap,
        "student_logit_scale": s.logit_scale,
        "teacher_logit_scale": t.logit_scale,
    }


def full_logits_loss(
    student_logits: HeadInput, teacher_logits: HeadInput, *, distillation_alpha: float
) -> Tensor:
    """Divergence of each token, (B, K), as compute_full_logit_self_distillation_loss."""
    s, t = student_logits, teacher_logits
    loss = fused_linear_jsd(
        **pair_arguments(s.hidden, s.head, t.hidden, t.head),
        shift_labels=torch.where(s.keep, 0, -100),
        beta=distillation_alpha,
        temperature=s.temperature,
        reduction="none",
    )
    return cast(Tensor, loss)


def selective_log_softmax(logits: HeadInput | Tensor, index: Tensor) -> Tensor:
    """Log-probability of each token of `index` (B, K), (B, K)."""
    if isinstance(logits, Tensor):
        raise TypeError("logits: expected the hidden states of a fused trainer, got logits")
    hidden, weight, bias = _one_dtype(logits.hidden, logits.head)
    value = fused_linear_logprob(
        hidden, weight, torch.where(logits.keep, index, -100),
        bias=bias, temperature=logits.temperature,
        softcap=logits.head.softcap, logit_scale=logits.head.logit_scale,
    )  # fmt: skip
    return cast(Tensor, value)


def sampled_token_loss(
    student_logits: HeadInput,
    teacher_logits: HeadInput,
    completion_ids: Tensor,  # (B, K)
    *,
    distillation_alpha: float,
) -> Tensor:
    """(B, K), as compute_sampled_token_self_distillation_loss: reverse KL of the sampled token."""
    if distillation_alpha != 1.0:
        raise ValueError(
            f"distillation_alpha: expected 1.0 for distillation_mode='sampled_token', "
            f"got {distillation_alpha}"
        )
    student = selective_log_softmax(student_logits, completion_ids)
    teacher = selective_log_softmax(teacher_logits, completion_ids)
    return (student - teacher).detach() * student


def _one_dtype(hidden: Tensor, head: LmHead) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias in the dtype of the model's own product.

    accelerate's autocast ends with the model's forward, which then returns float32: the narrower of
    the two dtypes is what the output layer multiplied in.
    """
    weight, bias = head.weight, head.bias
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        dtype = min(hidden.dtype, weight.dtype, key=lambda d: torch.finfo(d).bits)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, weight, bias
