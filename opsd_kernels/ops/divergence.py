"""Registered operators of the divergence family: schema, fake kernels, autograd."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import checks
from opsd_kernels.ops import kept
from opsd_kernels.ops.common import (
    GRADS,
    HOST_READS,
    SumOutputs,
    backend_of,
    backend_scope,
    by_name,
    fake_grad,
    fake_sum_outputs,
    gradients_of,
    grads_needed,
    in_order,
    keep_with_upstream,
    or_empty,
    parameter_dtypes,
    plan_for,
    refuse_double_backward,
    save_sum,
    scale_cast,
    scaled_grads,
    sum_backward,
    sum_outputs,
    whole_vocabulary,
    zero_dropped,
)
from opsd_kernels.problem import (
    DIVERGENCE_STATS,
    DivergenceProblem,
    Execution,
    GradsNeeded,
    Head,
    Kept,
    Result,
    stat_dtype,
)

_STUDENT = ("student_input", "student_weight", "student_bias")
# Tensors that backward needs to make the gradients of a trained head.
_SAVED = (*_STUDENT, "teacher_input", "teacher_weight", "teacher_bias", "labels", "keep")


def divergence(
    p: DivergenceProblem, row_scale: Tensor, reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, value (N,), stats (S, N)); value and stats are detached.

    The loss is sum(row_scale * value) if reduced, else row_scale * value (N,).
    """
    needed = grads_needed(p.student)
    s, t, e = p.student, p.teacher, p.execution
    tensors = (s.hidden, s.weight, s.bias, t.hidden, t.weight, t.bias, p.labels, p.keep)
    numbers = (p.beta, p.clip, s.softcap, t.softcap, s.temperature, t.temperature)
    run = (p.with_stats, e.schedule, e.workspace_bytes, e.group_name, e.precision)
    flags = (needed.hidden, needed.weight, needed.bias)
    if reduced and (needed.weight or needed.bias):
        loss, value, stats, *_ = divergence_sum(*tensors, *numbers, *run, *flags, row_scale)
        return loss, value, stats
    with kept.keeping(needed):
        value, stats, _ = divergence_tokens(*tensors, *numbers, *run, *flags)
    loss = value * row_scale
    return (loss.sum() if reduced else loss), value.detach(), stats


def _problem(a: Mapping[str, Any]) -> DivergenceProblem:
    """The problem of an operator's arguments."""
    student, teacher = (
        Head(*(a[f"{model}_{x}"] for x in ("input", "weight", "bias", "softcap", "temperature")))
        for model in ("student", "teacher")
    )
    run = Execution(a["schedule"], a["workspace_bytes"], a["group_name"], a["precision"])
    return DivergenceProblem(
        student, teacher, a["labels"], a["keep"], a["beta"], a["clip"], a["with_stats"], run
    )


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
    """(value (N,), stats (S, N), d value / d hidden (N, D) or empty if a head is trained)."""
    p = _problem(locals())
    trained = grad_weight or grad_bias
    later = kept.wanted(group_name) if trained else None
    result = _run_divergence(p, None, GradsNeeded(hidden=grad_hidden and not trained), later)
    kept.put(result.kept)
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
    """(sum(row_scale * value), value, stats, dh, dW, db, scale); multiply dh, dW, db by scale."""
    p = _problem(locals())
    result = _run_divergence(p, row_scale, GradsNeeded(grad_hidden, grad_weight, grad_bias))
    return sum_outputs(result, row_scale)


@divergence_tokens.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    a = by_name("divergence_tokens", inputs)
    h, trained = a["student_input"], a["grad_weight"] or a["grad_bias"]
    value = h.new_empty(h.shape[0], dtype=stat_dtype(h.dtype))
    stats = value.new_empty(len(DIVERGENCE_STATS) if a["with_stats"] else 0, h.shape[0])
    return value, stats, fake_grad(h, a["grad_hidden"] and not trained)


@divergence_sum.register_fake
def _(*inputs: Any) -> SumOutputs:
    a = by_name("divergence_sum", inputs)
    stats = len(DIVERGENCE_STATS) if a["with_stats"] else 0
    return fake_sum_outputs(a["student_input"], a["student_weight"], stats, a)


def _run_divergence(
    p: DivergenceProblem,
    row_scale: Tensor | None,
    needed: GradsNeeded,
    later: GradsNeeded | None = None,
    from_forward: Kept | None = None,
) -> Result:
    """later: the gradients of a backward, for which logits are kept where that can be."""
    group = p.execution.group_name
    with backend_scope(p.student.hidden):
        checks.refuse_in_capture(
            p.student.hidden, shift_labels=p.labels, token_weight=p.keep, process_group=group
        )
        _, vocab_size, largest = whole_vocabulary(p.student, p.execution)
        if p.labels is not None:
            p.keep = checks.labels_in_vocabulary("shift_labels", p.labels, p.keep, vocab_size)
        chosen = plan_for(
            "divergence", p.student, largest, p.execution, row_scale, later or needed, p.teacher,
            two_passes=p.clip is not None or p.beta not in (0.0, 1.0), clipped=p.clip is not None,
            from_forward=from_forward,
        )  # fmt: skip
        extra = kept.arguments(chosen, later, from_forward)
        backend = backend_of(chosen.backend)
        result: Result = backend.divergence(p, chosen, row_scale, needed, **extra)
        return result


def _divergence_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = by_name("divergence_tokens", inputs)
    ctx.trained = a["grad_weight"] or a["grad_bias"]
    ctx.dtypes = parameter_dtypes(a, _STUDENT)
    ctx.numbers = {name: value for name, value in a.items() if name not in _SAVED}
    ctx.kept = kept.take()
    _, stats, grad_hidden = output
    saved = [a[name] for name in _SAVED] if ctx.trained else [a["keep"], grad_hidden]
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(stats, grad_hidden)
    ctx.set_materialize_grads(False)


def _divergence_tokens_backward(
    ctx: Any, grad_value: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_value is None:
        return in_order("divergence_tokens", {})
    refuse_double_backward()
    if not ctx.trained:
        keep, grad_hidden = ctx.saved_tensors
        factor, dtype = zero_dropped(grad_value, keep), ctx.dtypes["student_input"]
        grad = scale_cast(grad_hidden, factor, dtype)
        return in_order("divergence_tokens", {"student_input": grad})
    saved = dict(zip(_SAVED, ctx.saved_tensors, strict=True))
    grad_value = zero_dropped(grad_value, saved["keep"])
    rows = keep_with_upstream(saved["keep"], ctx.numbers["group_name"], grad_value)
    from_forward, ctx.kept = ctx.kept, None
    if from_forward is not None and kept.same_rows(saved["keep"], rows):
        a = {**saved, **ctx.numbers}
        needed = GradsNeeded(*(a[flag] for flag in GRADS))
        result = _run_divergence(_problem(a), grad_value, needed, None, from_forward)
        *made, scale = gradients_of(result)
        return in_order("divergence_tokens", scaled_grads(made, scale, ctx.dtypes))
    saved["keep"] = rows
    numbers = {**ctx.numbers, "with_stats": False}
    _, _, _, *grads, scale = divergence_sum(**saved, **numbers, row_scale=grad_value)
    return in_order("divergence_tokens", scaled_grads(grads, scale, ctx.dtypes))


def _divergence_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = by_name("divergence_sum", inputs)
    save_sum(ctx, parameter_dtypes(a, _STUDENT), output)


divergence_tokens.register_autograd(
    _divergence_tokens_backward, setup_context=_divergence_tokens_setup
)
divergence_sum.register_autograd(
    functools.partial(sum_backward, "divergence_sum"), setup_context=_divergence_sum_setup
)
