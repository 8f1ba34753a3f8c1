"""Divergence from a teacher that is known at a few entries of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_kernels import checks
from opsd_kernels.problem import stat_dtype
from opsd_kernels.reference.rows import divergence


def topk_divergence(
    student_logprob: Tensor,  # (..., K)
    teacher_logprob: Tensor,  # (..., K)
    beta: float,
    tail: bool = True,
) -> Tensor:
    """Divergence of each token over K entries of the vocabulary, in plain PyTorch.

    The generalized Jensen-Shannon divergence of the OPSD paper (Eq. 7), with m = beta t +
    (1 - beta) s, over the K entries k and, with `tail`, the rest of the vocabulary r as one more
    outcome: top-k with tail, as in TRL and verl. ::

        beta sum_k t_k log(t_k / m_k) + (1 - beta) sum_k s_k log(s_k / m_k)
        log s_r = log1mexp(logsumexp_k(log s_k)) = log(1 - sum_k s_k)

    beta = 0 is the forward KL, sum t log(t / s), and beta = 1 the reverse one. With K = V it equals
    the divergence of the whole vocabulary, and with less and a tail it is never more.

    A rest is at least eps, the rounding of the dtype (1.2e-7 in fp32): less cannot be told from the
    rounding of the sum. So two rests of 0 add 0; a teacher's rest beside a student's of 0 costs
    log(rest / eps) instead of infinity. A rest of eps has no gradient.

    Args:
        student_logprob: log-probabilities of the student at the teacher's ids, for example from
            `fused_linear_logprob`; only they are differentiated. -inf is a probability of 0.
        teacher_logprob: of the teacher, in the order of the student's, for example from
            `fused_linear_topk`.
        beta: in [0, 1].
        tail: whether the rest counts. Without it the sum is over K terms alone, and may be
            negative.

    Returns:
        (...) in fp32, or fp64 for a student in fp64.

    Raises:
        ValueError: shapes or devices differ, or beta is not in [0, 1].
        TypeError: no floating-point tensors.
    """
    for name, value in (("student_logprob", student_logprob), ("teacher_logprob", teacher_logprob)):
        checks.tensor(name, value)
        checks.floating_dtype(name, value)
    if student_logprob.ndim < 1:
        raise ValueError("student_logprob: expected shape (..., K), got a scalar")
    if teacher_logprob.shape != student_logprob.shape:
        raise ValueError(
            f"teacher_logprob: expected shape {tuple(student_logprob.shape)} as student_logprob "
            f"has, got {tuple(teacher_logprob.shape)}"
        )
    checks.same_device(
        "teacher_logprob", teacher_logprob, "student_logprob", student_logprob.device
    )
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    dtype = stat_dtype(student_logprob.dtype)
    log_s, log_t = student_logprob.to(dtype), teacher_logprob.detach().to(dtype)
    if tail:
        log_s, log_t = _with_rest(log_s), _with_rest(log_t)
    return divergence(log_s, log_t, beta)


def _with_rest(logprob: Tensor) -> Tensor:
    """(..., K + 1): the log-probability of all other entries comes last."""
    eps = torch.finfo(logprob.dtype).eps
    known = logprob.exp().sum(-1, keepdim=True).clamp(max=1.0 - eps)
    return torch.cat([logprob, torch.log1p(-known)], -1)
