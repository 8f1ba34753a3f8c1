"""The sampled-token objective: the teacher's preference for the sampled token as an advantage."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import checks
from opsd_kernels.ops.logprob import logprob
from opsd_kernels.reduction import row_scale


def fused_linear_advantage(
    student_input: Tensor,  # (..., D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_input: Tensor,  # (..., D_t)
    teacher_weight: Tensor,  # (V, D_t)
    target: Tensor,  # (...)
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage log t(y) - log s(y) of each sampled token y, as in Equation 9 of the OPSD paper.

    Arguments as `fused_jsd.fused_linear_jsd`, with `target` the sampled tokens.

    Returns:
        advantage (...), detached, and student_logprob (...), differentiable; both fp32, 0 where
        the target is `ignore_index`. `policy_gradient_loss` makes the loss of them.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it expects.
    """
    checks.same_tokens(student_input, teacher_input)
    options = {
        "temperature": temperature,
        "ignore_index": ignore_index,
        "vocab_size": checks.shared_vocabulary(student_weight, teacher_weight, vocab_size),
        "with_entropy": False,
        "execution": checks.execution(schedule, workspace_bytes, process_group),
    }
    student = checks.logprob_problem(
        student_input, student_weight, target,
        bias=student_bias, softcap=student_softcap, logit_scale=student_logit_scale,
        prefix="student_", **options,
    )  # fmt: skip
    teacher = checks.logprob_problem(
        teacher_input, teacher_weight, target,
        bias=teacher_bias, softcap=teacher_softcap, logit_scale=teacher_logit_scale,
        prefix="teacher_", **options,
    )  # fmt: skip
    with torch.no_grad():
        teacher_logprob = logprob(teacher)[0].reshape(target.shape)
    student_logprob = logprob(student)[0].reshape(target.shape)
    return teacher_logprob - student_logprob.detach(), student_logprob


def policy_gradient_loss(
    advantage: Tensor,  # (...)
    student_logprob: Tensor,  # (...)
    target: Tensor | None = None,  # (...)
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,  # (...)
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """-advantage * student_logprob, the advantage taken as a constant (Equation 9).

    Args:
        target: where given, the mean counts only tokens whose target is not `ignore_index`, and
            the others contribute nothing.
        token_weight: a token of weight 0 contributes nothing, whatever its advantage is.
        reduction, num_tokens: as `fused_jsd.fused_linear_jsd`.

    Returns:
        fp32 scalar, or (...) for reduction "none".

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it expects.
    """
    advantage = advantage.detach()
    shape, device = student_logprob.shape, student_logprob.device
    checks.reduction_arguments(reduction, num_tokens, device)
    checks.token_values("advantage", advantage, "student_logprob", shape, device)
    counted = None
    if target is not None:
        counted = checks.labels("target", target, shape, device) != ignore_index
    keep = checks.weighted(counted, token_weight, "student_logprob", shape, device)
    advantage, chosen = advantage.reshape(-1), student_logprob.reshape(-1)
    if keep is not None:  # before the product: 0 times NaN is NaN, in the gradient too
        advantage, chosen = torch.where(keep, advantage, 0), torch.where(keep, chosen, 0)
    scale = row_scale(chosen, counted, keep, token_weight, reduction, num_tokens)
    value = -advantage * chosen * scale
    return value.reshape(shape) if reduction == "none" else value.sum()
