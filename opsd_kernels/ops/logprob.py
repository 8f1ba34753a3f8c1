"""Registered operators of the log-probability family: schema, fake kernels, autograd."""

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
    LOGPROB_STATS,
    Execution,
    GradsNeeded,
    Head,
    Kept,
    LogprobProblem,
    Result,
    stat_dtype,
)

_PARAMETERS = ("input", "weight", "bias")
# Tensors that backward needs to make the gradients of a trained head.
_SAVED = (*_PARAMETERS, "target", "keep", "class_weight", "label_weight", "z_weight")


def logprob(
    p: LogprobProblem,
    row_scale: Tensor | None = None,
    entropy_grad: bool = False,
    lse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value (N,), entropy (N,), lse (N,), stats (S, N)).

    With row_scale (N,) the first is sum(row_scale * value) instead, and only it is differentiable.
    Else entropy and lse are too, if their flag says so.
    """
    needed = grads_needed(p.head)
    h, e = p.head, p.execution
    head = (h.hidden, h.weight, h.bias)
    tensors = (*head, p.target, p.keep, h.class_weight, p.label_weight, p.z_weight)
    numbers = (h.softcap, h.temperature, p.label_smoothing)
    run = (p.with_entropy, p.with_predicted, e.schedule, e.workspace_bytes, e.group_name)
    flags = (needed.hidden, needed.weight, needed.bias)
    if row_scale is not None and (needed.weight or needed.bias):
        loss, _, stats, *_ = logprob_sum(*tensors, *numbers, *run, *flags, row_scale, None, None)
        return loss, *(stats[LOGPROB_STATS.index(name)] for name in ("entropy", "lse")), stats
    flags_of_tokens = (*flags, entropy_grad, lse_grad)
    with kept.keeping(needed):
        value, entropy, lse, stats, _, _ = logprob_tokens(
            *tensors, *numbers, *run, *flags_of_tokens
        )
    return (value if row_scale is None else (value * row_scale).sum()), entropy, lse, stats


def _problem(a: Mapping[str, Any]) -> LogprobProblem:
    """The problem of an operator's arguments."""
    names = ("input", "weight", "bias", "softcap", "temperature", "class_weight")
    run = Execution(a["schedule"], a["workspace_bytes"], a["group_name"])
    return LogprobProblem(
        Head(*(a[name] for name in names)), a["target"], a["keep"], a["label_smoothing"],
        a["with_entropy"], run, a["with_predicted"], a["label_weight"], a["z_weight"],
    )  # fmt: skip


@torch.library.custom_op("opsd_kernels::logprob_tokens", mutates_args=(), tags=HOST_READS)
def logprob_tokens(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor | None,
    class_weight: Tensor | None,
    label_weight: Tensor | None,
    z_weight: Tensor | None,
    softcap: float | None,
    temperature: float,
    label_smoothing: float,
    with_entropy: bool,
    with_predicted: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    grad_entropy: bool,
    grad_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value (N,), entropy (N,), lse (N,), stats (S, N), d value / dh, d entropy / dh).

    The gradients are (N, D), or empty if backward makes them.
    """
    p = _problem(locals())
    in_forward = grad_hidden and not (grad_weight or grad_bias or grad_lse)
    needed = GradsNeeded(hidden=in_forward, entropy=in_forward and grad_entropy)
    in_backward = grad_weight or grad_bias or (grad_hidden and grad_lse)
    later = kept.wanted(group_name) if in_backward else None
    result = _run_logprob(p, (None, None, None), needed, later)
    kept.put(result.kept)
    return (
        result.value,
        result.stats[LOGPROB_STATS.index("entropy")].clone(),
        result.stats[LOGPROB_STATS.index("lse")].clone(),
        result.stats,
        or_empty(result.grad_hidden, result.value),
        or_empty(result.grad_entropy, result.value),
    )


@torch.library.custom_op("opsd_kernels::logprob_sum", mutates_args=(), tags=HOST_READS)
def logprob_sum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor | None,
    class_weight: Tensor | None,
    label_weight: Tensor | None,
    z_weight: Tensor | None,
    softcap: float | None,
    temperature: float,
    label_smoothing: float,
    with_entropy: bool,
    with_predicted: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    row_scale: Tensor,
    entropy_scale: Tensor | None,
    lse_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As divergence_sum; the gradients include entropy_scale * entropy and lse_scale * lse."""
    p = _problem(locals())
    needed = GradsNeeded(grad_hidden, grad_weight, grad_bias)
    scales = row_scale, entropy_scale, lse_scale
    return sum_outputs(_run_logprob(p, scales, needed), row_scale)


@logprob_tokens.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    a = by_name("logprob_tokens", inputs)
    h, in_backward = a["input"], a["grad_weight"] or a["grad_bias"] or a["grad_lse"]
    in_forward = a["grad_hidden"] and not in_backward
    value = h.new_empty(h.shape[0], dtype=stat_dtype(h.dtype))
    return (
        value,
        torch.empty_like(value),
        torch.empty_like(value),
        value.new_empty(len(LOGPROB_STATS), h.shape[0]),
        fake_grad(h, in_forward),
        fake_grad(h, in_forward and a["grad_entropy"]),
    )


@logprob_sum.register_fake
def _(*inputs: Any) -> SumOutputs:
    a = by_name("logprob_sum", inputs)
    return fake_sum_outputs(a["input"], a["weight"], len(LOGPROB_STATS), a)


def _run_logprob(
    p: LogprobProblem,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None],  # of value, entropy and lse
    needed: GradsNeeded,
    later: GradsNeeded | None = None,
    from_forward: Kept | None = None,
) -> Result:
    """later: the gradients of a backward, for which logits are kept where that can be."""
    with backend_scope(p.head.hidden):
        checks.refuse_in_capture(p.head.hidden, target=p.target)
        first, vocab_size, largest = whole_vocabulary(p.head, p.execution)
        p.keep = checks.labels_in_vocabulary("target", p.target, p.keep, vocab_size)
        if p.head.class_weight is not None:
            checks.class_weight_of(p.head.class_weight, vocab_size)
            shard = p.head.class_weight[first : first + p.head.weight.shape[0]]
            p.head.class_weight = shard if p.label_smoothing != 0.0 else None
        chosen = plan_for(
            "logprob", p.head, largest, p.execution, scales[0], later or needed,
            from_forward=from_forward,
        )  # fmt: skip
        extra = kept.arguments(chosen, later, from_forward)
        backend = backend_of(chosen.backend)
        result: Result = backend.logprob(p, chosen, *scales, needed, **extra)
        return result


def _logprob_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = by_name("logprob_tokens", inputs)
    ctx.in_backward = a["grad_weight"] or a["grad_bias"] or a["grad_lse"]
    ctx.dtypes = parameter_dtypes(a, _PARAMETERS)
    ctx.numbers = {n: v for n, v in a.items() if n not in (*_SAVED, "grad_entropy", "grad_lse")}
    ctx.kept = kept.take()
    _, _, _, stats, *grads = output
    saved = [a[name] for name in _SAVED] if ctx.in_backward else [a["keep"], *grads]
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(stats, *grads)
    ctx.set_materialize_grads(False)


def _logprob_tokens_backward(
    ctx: Any,
    grad_value: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    upstreams = [x for x in (grad_value, grad_entropy, grad_lse) if x is not None]
    if not upstreams:
        return in_order("logprob_tokens", {})
    refuse_double_backward()
    if not ctx.in_backward:
        keep, *grads = ctx.saved_tensors
        terms = [
            scale_cast(grad, zero_dropped(upstream, keep), ctx.dtypes["input"])
            for grad, upstream in zip(grads, (grad_value, grad_entropy), strict=True)
            if upstream is not None
        ]
        return in_order("logprob_tokens", {"input": sum(terms[1:], start=terms[0])})
    if grad_value is None:
        grad_value = torch.zeros_like(upstreams[0])
    saved = dict(zip(_SAVED, ctx.saved_tensors, strict=True))
    given = grad_value, grad_entropy, grad_lse
    value_scale, entropy_scale, lse_scale = (zero_dropped(x, saved["keep"]) for x in given)
    scales = value_scale, entropy_scale, lse_scale
    rows = keep_with_upstream(saved["keep"], ctx.numbers["group_name"], *scales)
    from_forward, ctx.kept = ctx.kept, None
    if from_forward is not None and kept.same_rows(saved["keep"], rows):
        a = {**saved, **ctx.numbers}
        needed = GradsNeeded(*(a[flag] for flag in GRADS))
        result = _run_logprob(_problem(a), scales, needed, None, from_forward)
        *made, scale = gradients_of(result)
        return in_order("logprob_tokens", scaled_grads(made, scale, ctx.dtypes))
    saved["keep"] = rows
    numbers = {**ctx.numbers, "with_predicted": False}
    names = ("row_scale", "entropy_scale", "lse_scale")
    _, _, _, *grads, scale = logprob_sum(
        **saved, **numbers, **dict(zip(names, scales, strict=True))
    )
    return in_order("logprob_tokens", scaled_grads(grads, scale, ctx.dtypes))


def _logprob_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = by_name("logprob_sum", inputs)
    save_sum(ctx, parameter_dtypes(a, _PARAMETERS), output)


logprob_tokens.register_autograd(_logprob_tokens_backward, setup_context=_logprob_tokens_setup)
logprob_sum.register_autograd(
    functools.partial(sum_backward, "logprob_sum"), setup_context=_logprob_sum_setup
)
