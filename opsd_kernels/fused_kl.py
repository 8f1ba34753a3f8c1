"""Forward and reverse KL: the two ends of the generalized JSD, by name."""

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
    """KL(t|s) = sum t (log t - log s) per token; gradient s - t.

    All options of `fused_linear_jsd` except beta.
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
    """KL(s|t) = sum s (log s - log t) per token; gradient s (log(s/t) - KL).

    All options of `fused_linear_jsd` except beta.
    """
    return _kl(
        1.0, (student_input, student_weight, teacher_input, teacher_weight), shift_labels, options
    )


def _kl(
    beta: float, heads: tuple[Tensor, ...], labels: Tensor | None, options: dict[str, Any]
) -> Tensor | tuple[Tensor, Stats]:
    if "beta" in options:
        raise TypeError("beta: a KL has none; call fused_linear_jsd for a divergence in between")
    return fused_linear_jsd(*heads, labels, beta=beta, **options)
