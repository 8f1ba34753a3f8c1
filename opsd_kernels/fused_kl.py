"""Forward and reverse KL: `fused_linear_jsd` with beta 0 and 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opsd_kernels.fused_jsd import Stats, fused_linear_jsd


def fused_linear_forward_kl(
    student_input: Tensor,  # (..., D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_input: Tensor,  # (..., D_t)
    teacher_weight: Tensor,  # (V, D_t)
    shift_labels: Tensor | None = None,  # (...)
    **options: Any,
) -> Tensor | tuple[Tensor, Stats]:
    """KL(t|s) of teacher t and student s, without the logits. Equal to the mean over tokens of ::

        log_s = torch.log_softmax((student_input @ student_weight.T).float(), -1)
        log_t = torch.log_softmax((teacher_input @ teacher_weight.T).float(), -1)
        torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)

    Its gradient with respect to the student's logits is s - t. Arguments, options, results and
    errors are those of `fused_linear_jsd`, except beta.
    """
    return _kl(
        0.0, (student_input, student_weight, teacher_input, teacher_weight), shift_labels, options
    )


def fused_linear_reverse_kl(
    student_input: Tensor,  # (..., D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_input: Tensor,  # (..., D_t)
    teacher_weight: Tensor,  # (V, D_t)
    shift_labels: Tensor | None = None,  # (...)
    **options: Any,
) -> Tensor | tuple[Tensor, Stats]:
    """KL(s|t) of student s and teacher t, without the logits. Equal to the mean over tokens of ::

        log_s = torch.log_softmax((student_input @ student_weight.T).float(), -1)
        log_t = torch.log_softmax((teacher_input @ teacher_weight.T).float(), -1)
        torch.nn.functional.kl_div(log_t, log_s, log_target=True, reduction="none").sum(-1)

    Its gradient with respect to the student's logits is s (log(s/t) - KL). Arguments, options,
    results and errors are those of `fused_linear_jsd`, except beta.
    """
    return _kl(
        1.0, (student_input, student_weight, teacher_input, teacher_weight), shift_labels, options
    )


def _kl(
    beta: float,
    heads: tuple[Tensor, Tensor, Tensor, Tensor],
    labels: Tensor | None,
    options: dict[str, Any],
) -> Tensor | tuple[Tensor, Stats]:
    if "beta" in options:
        raise TypeError("beta: a KL has none; call fused_linear_jsd for a divergence in between")
    return fused_linear_jsd(*heads, labels, beta=beta, **options)
