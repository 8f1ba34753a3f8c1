"""Policy gradient on sampled tokens: log t(y) - log s(y) of teacher and student as advantage."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import arguments, checks
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
    """Advantage log t(y) - log s(y) of each sampled token y, without the logits. Equal to ::

        student_logprob = fused_linear_logprob(student_input, student_weight, target, ...)
        teacher_logprob = fused_linear_logprob(teacher_input, teacher_weight, target, ...)
        (teacher_logprob - student_logprob).detach(), student_logprob

    This is the advantage in Equation 9 of the OPSD paper; `policy_gradient_loss` is its loss.

    Args:
        target: the sampled tokens, integers in [0, V), or `ignore_index`.
        Other arguments are those of `fused_linear_jsd`.

    Returns:
        advantage (...), detached, and student_logprob (...), differentiable; both 0 where the
        target is `ignore_index`, fp32 or fp64 for fp64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_linear_jsd`.
    """
    checks.same_tokens(student_input, teacher_input)
    logprob_problem = functools.partial(
        arguments.logprob_problem,
        target=target,
        temperature=temperature,
        ignore_index=ignore_index,
        vocab_size=checks.shared_vocabulary(student_weight, teacher_weight, vocab_size),
        with_entropy=False,
        execution=checks.execution(schedule, workspace_bytes, process_group),
    )
    student = logprob_problem(
        student_input, student_weight, prefix="student_",
        bias=student_bias, softcap=student_softcap, logit_scale=student_logit_scale,
    )  # fmt: skip
    teacher = logprob_problem(
        teacher_input, teacher_weight, prefix="teacher_",
        bias=teacher_bias, softcap=teacher_softcap, logit_scale=teacher_logit_scale,
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
    """Policy-gradient loss of Equation 9 of the OPSD paper. Equal to ::

        (-advantage.detach() * student_logprob).mean()

    Args:
        advantage, student_logprob: floating-point, as `fused_linear_advantage` returns them.
        target: if given, tokens whose target is `ignore_index` are not counted in the mean and
            contribute nothing.
        token_weight: multiplies each token's loss; a token of weight 0 contributes nothing, even
            if its advantage is NaN.
        reduction, num_tokens: as `fused_linear_jsd`.

    Returns:
        A scalar, or (...) for reduction "none"; fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it expects.
    """
    advantage = advantage.detach()
    shape, device = student_logprob.shape, student_logprob.device
    checks.reduction_arguments(reduction, num_tokens, device)
    checks.token_values("advantage", advantage, "student_logprob", shape, device)
    counted = None
    if target is not None:
        counted = checks.flat_labels("target", target, shape, device) != ignore_index
    keep = arguments.kept_tokens(counted, token_weight, "student_logprob", shape, device)
    advantage, chosen = advantage.reshape(-1), student_logprob.reshape(-1)
    if keep is not None:  # before the product: 0 times NaN is NaN, in the gradient too
        advantage, chosen = torch.where(keep, advantage, 0), torch.where(keep, chosen, 0)
    scale = row_scale(chosen, counted, keep, token_weight, reduction, num_tokens)
    value = -advantage * chosen * scale
    return value.reshape(shape) if reduction == "none" else value.sum()
