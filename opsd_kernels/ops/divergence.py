"""Registered operators of the divergence family: schema, fake kernels, autograd."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import checks
from opsd_kernels.ops.common import (
    GRADS,
    HOST_READS,
    at_kept,
    backend_of,
    by_name,
    dispatched,
    fake_grad,
    fake_sum,
    in_order,
    or_empty,
    plan_for,
    refuse_double_backward,
    save_sum,
    scale_cast,
    scaled_grads,
    still_kept,
    sum_backward,
    summed,
    wanted,
    wanted_dtypes,
    whole_vocabulary,
)
from opsd_kernels.problem import (
    DIVERGENCE_STATS,
    DivergenceProblem,
    Execution,
    GradsNeeded,
    Head,
    Result,
    stat_dtype,
)

_STUDENT = ("student_input", "student_weight", "student_bias")
# What backward needs again to make the gradients of a trained head.
_SAVED = (*_STUDENT, "teacher_input", "teacher_weight", "teacher_bias", "labels", "keep")


def divergence(
    p: DivergenceProblem, row_scale: Tensor, reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, value, stats): loss is sum(row_scale * value) when reduced, else (N,) weighted."""
    needed = wanted(p.student)
    s, t, e = p.student, p.teacher, p.execution
    tensors = (s.hidden, s.weight, s.bias, t.hidden, t.weight, t.bias, p.labels, p.keep)
    numbers = (p.beta, p.clip, s.softcap, t.softcap, s.temperature, t.temperature)
    run = (p.with_stats, e.schedule, e.workspace_bytes, e.group_name, e.precision)
    flags = (needed.hidden, needed.weight, needed.bias)
    if reduced and (needed.weight or needed.bias):
        loss, value, stats, *_ = divergence_sum(*tensors, *numbers, *run, *flags, row_scale)
        return loss, value, stats
    value, stats, _ = divergence_tokens(*tensors, *numbers, *run, *flags)
    weighted = value * row_scale
    return (weighted.sum() if reduced else weighted), value.detach(), stats


@torch.library.custom_op("opsd_kernels::divergence_tokens", mutates_args=(), tags=HOST_READS)
def divergence_tokens(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    beta: float,
    clip: float | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_temperature: float,
    teacher_temperature: float,
    with_stats: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    precision: str,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(value (N,), stats (S, N), d value / d hidden (N, D) or empty)."""
    p = DivergenceProblem(
        Head(student_input, student_weight, student_bias, student_softcap, student_temperature),
        Head(teacher_input, teacher_weight, teacher_bias, teacher_softcap, teacher_temperature),
        labels, keep, beta, clip, with_stats,
        Execution(schedule, workspace_bytes, group_name, precision),
    )  # fmt: skip
    now = grad_hidden and not (grad_weight or grad_bias)
    result = _run_divergence(p, None, GradsNeeded(hidden=now))
    return result.value, result.stats, or_empty(result.grad_hidden, result.value)


@torch.library.custom_op("opsd_kernels::divergence_sum", mutates_args=(), tags=HOST_READS)
def divergence_sum(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    beta: float,
    clip: float | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_temperature: float,
    teacher_temperature: float,
    with_stats: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    precision: str,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    row_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum(row_scale * value), value, stats, dh, dW, db, scale); gradients times scale."""
    p = DivergenceProblem(
        Head(student_input, student_weight, student_bias, student_softcap, student_temperature),
        Head(teacher_input, teacher_weight, teacher_bias, teacher_softcap, teacher_temperature),
        labels, keep, beta, clip, with_stats,
        Execution(schedule, workspace_bytes, group_name, precision),
    )  # fmt: skip
    result = _run_divergence(p, row_scale, GradsNeeded(grad_hidden, grad_weight, grad_bias))
    return summed(result, row_scale)


@divergence_tokens.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    a = by_name("divergence_tokens", inputs)
    h, (hidden, weight, bias) = a["student_input"], (a[name] for name in GRADS)
    value = h.new_empty(h.shape[0], dtype=stat_dtype(h.dtype))
    stats = value.new_empty(len(DIVERGENCE_STATS) if a["with_stats"] else 0, h.shape[0])
    return value, stats, fake_grad(h, hidden and not (weight or bias))


@divergence_sum.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    a = by_name("divergence_sum", inputs)
    stats = len(DIVERGENCE_STATS) if a["with_stats"] else 0
    return fake_sum(a["student_input"], a["student_weight"], stats, [a[name] for name in GRADS])


def _run_divergence(p: DivergenceProblem, row_scale: Tensor | None, needed: GradsNeeded) -> Result:
    group = p.execution.group_name
    with dispatched(p.student.hidden):
        checks.outside_capture(
            p.student.hidden, shift_labels=p.labels, token_weight=p.keep, process_group=group
        )
        _, vocab_size, largest = whole_vocabulary(p.student, p.execution)
        if p.labels is not None:
            checks.labels_in_vocabulary("shift_labels", p.labels, p.keep, vocab_size)
        chosen = plan_for(
            "divergence", p.student, largest, p.execution, row_scale, needed, p.teacher,
            two_passes=p.clip is not None or p.beta not in (0.0, 1.0), clipped=p.clip is not None,
        )  # fmt: skip
        return backend_of(chosen).divergence(p, chosen, row_scale, needed)


def _divergence_tokens_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    a = by_name("divergence_tokens", inputs)
    ctx.trained = a["grad_weight"] or a["grad_bias"]
    ctx.dtypes = wanted_dtypes(a, _STUDENT)
    ctx.numbers = {name: value for name, value in a.items() if name not in _SAVED}
    ctx.save_for_backward(
        *([a[name] for name in _SAVED] if ctx.trained else (a["keep"], output[2]))
    )
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _divergence_tokens_backward(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple:
    if grad_value is None:
        return in_order("divergence_tokens", [])
    refuse_double_backward()
    if not ctx.trained:
        keep, unit = ctx.saved_tensors
        grad = scale_cast(unit, at_kept(grad_value, keep), ctx.dtypes[0])
        return in_order("divergence_tokens", [grad])
    saved = dict(zip(_SAVED, ctx.saved_tensors, strict=True))
    grad_value = at_kept(grad_value, saved["keep"])
    saved["keep"] = still_kept(saved["keep"], ctx.numbers["group_name"], grad_value)
    numbers = {**ctx.numbers, "with_stats": False}
    _, _, _, *grads, scale = divergence_sum(**saved, **numbers, row_scale=grad_value)
    return in_order("divergence_tokens", scaled_grads(grads, scale, ctx.dtypes))


def _divergence_sum_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    a = by_name("divergence_sum", inputs)
    save_sum(ctx, wanted_dtypes(a, _STUDENT), output)


divergence_tokens.register_autograd(
    _divergence_tokens_backward, setup_context=_divergence_tokens_setup
)
divergence_sum.register_autograd(
    functools.partial(sum_backward, "divergence_sum"), setup_context=_divergence_sum_setup
)
