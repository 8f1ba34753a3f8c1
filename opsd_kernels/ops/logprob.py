"""Registered operators of the log-probability family: schema, fake kernels, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opsd_kernels import checks
from opsd_kernels.ops.common import (
    backend_of,
    fake_grad,
    fake_sum,
    in_order,
    no_autocast,
    or_empty,
    plan_for,
    refuse_double_backward,
    save_sum,
    scale_cast,
    scaled_grads,
    sum_backward,
    summed,
    wanted,
    whole_vocabulary,
)
from opsd_kernels.problem import (
    LOGPROB_STATS,
    Execution,
    Head,
    LogprobProblem,
    Result,
    Wanted,
    stat_dtype,
)


def logprob(
    p: LogprobProblem, row_scale: Tensor | None = None, entropy_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(value (N,) or, with row_scale, sum(row_scale * value); entropy; stats)."""
    needed = wanted(p.head)
    h, e = p.head, p.execution
    tensors = (h.hidden, h.weight, h.bias, p.target, p.keep)
    numbers = (p.temperature, h.softcap, p.label_smoothing)
    run = (p.with_entropy, e.schedule, e.workspace_bytes, e.group_name)
    flags = (needed.hidden, needed.weight, needed.bias)
    if row_scale is not None and (needed.weight or needed.bias):
        loss, _, stats, *_ = logprob_sum(*tensors, *numbers, *run, *flags, row_scale, None)
        return loss, stats[LOGPROB_STATS.index("entropy")], stats
    value, entropy, stats, _, _ = logprob_tokens(*tensors, *numbers, *run, *flags, entropy_grad)
    return (value if row_scale is None else (value * row_scale).sum()), entropy, stats


@torch.library.custom_op("opsd_kernels::logprob_tokens", mutates_args=())
def logprob_tokens(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor | None,
    temperature: float,
    softcap: float | None,
    label_smoothing: float,
    with_entropy: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    grad_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value (N,), entropy (N,), stats (S, N), d value / dh, d entropy / dh)."""
    p = LogprobProblem(
        Head(input, weight, bias, softcap), target, keep, temperature, label_smoothing,
        with_entropy, Execution(schedule, workspace_bytes, group_name),
    )  # fmt: skip
    now = grad_hidden and not (grad_weight or grad_bias)
    result = _run_logprob(p, None, None, Wanted(hidden=now, entropy=now and grad_entropy))
    return (
        result.value,
        result.stats[LOGPROB_STATS.index("entropy")].clone(),
        result.stats,
        or_empty(result.grad_hidden, result.value),
        or_empty(result.grad_entropy, result.value),
    )


@torch.library.custom_op("opsd_kernels::logprob_sum", mutates_args=())
def logprob_sum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor | None,
    temperature: float,
    softcap: float | None,
    label_smoothing: float,
    with_entropy: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    row_scale: Tensor,
    entropy_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As divergence_sum, of sum(row_scale * value + entropy_scale * entropy) in the gradients."""
    p = LogprobProblem(
        Head(input, weight, bias, softcap), target, keep, temperature, label_smoothing,
        with_entropy, Execution(schedule, workspace_bytes, group_name),
    )  # fmt: skip
    needed = Wanted(grad_hidden, grad_weight, grad_bias)
    return summed(_run_logprob(p, row_scale, entropy_scale, needed), row_scale)


@logprob_tokens.register_fake
def _(h, w, b, *rest) -> tuple[Tensor, ...]:
    hidden, weight, bias, entropy = rest[-4:]
    now = hidden and not (weight or bias)
    value = h.new_empty(h.shape[0], dtype=stat_dtype(h.dtype))
    stats = value.new_empty(len(LOGPROB_STATS), h.shape[0])
    return (
        value,
        torch.empty_like(value),
        stats,
        fake_grad(h, now),
        fake_grad(h, now and entropy),
    )


@logprob_sum.register_fake
def _(h, w, b, *rest) -> tuple[Tensor, ...]:
    return fake_sum(h, w, len(LOGPROB_STATS), rest[-5:-2])


def _run_logprob(
    p: LogprobProblem, row_scale: Tensor | None, entropy_scale: Tensor | None, needed: Wanted
) -> Result:
    vocab_size, largest = whole_vocabulary(p.head, p.execution)
    checks.labels_in_vocabulary("target", p.target, p.keep, vocab_size)
    with no_autocast(p.head.hidden):
        chosen = plan_for("logprob", p.head, largest, p.execution, row_scale, needed)
        return backend_of(chosen).logprob(p, chosen, row_scale, entropy_scale, needed)


def _logprob_tokens_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.trained = inputs[13] or inputs[14]
    ctx.numbers = inputs[5:15]
    saved = inputs[:5] if ctx.trained else output[3:]
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _logprob_tokens_backward(
    ctx: Any, grad_value: Tensor | None, grad_entropy: Tensor | None, *_: Any
) -> tuple:
    if grad_value is None and grad_entropy is None:
        return (None,) * 16
    refuse_double_backward()
    if not ctx.trained:
        unit, unit_entropy = ctx.saved_tensors
        terms = [
            scale_cast(unit, upstream, unit.dtype)
            for unit, upstream in ((unit, grad_value), (unit_entropy, grad_entropy))
            if upstream is not None
        ]
        return in_order(16, [sum(terms[1:], start=terms[0])])
    if grad_value is None:
        grad_value = torch.zeros_like(grad_entropy)
    scales = grad_value.contiguous(), None if grad_entropy is None else grad_entropy.contiguous()
    _, _, _, *grads, scale = logprob_sum(*ctx.saved_tensors, *ctx.numbers, *scales)
    dtypes = [None if p is None else p.dtype for p in ctx.saved_tensors[:3]]
    return in_order(16, scaled_grads(grads, scale, ctx.numbers[-3:], dtypes))


def _logprob_sum_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    save_sum(ctx, inputs[:3], inputs[12:15], output)


logprob_tokens.register_autograd(_logprob_tokens_backward, setup_context=_logprob_tokens_setup)
logprob_sum.register_autograd(sum_backward(17), setup_context=_logprob_sum_setup)
