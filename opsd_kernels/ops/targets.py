"""Registered operators for several targets of a token: schema, fake kernels, autograd.

With targets id_k, upstream gradients g_k and g_lse, and mass = sum_k g_k - g_lse ::

    dz_j = sum_k g_k [j = id_k] - mass s_j

Nearly all of g_k and of -mass s_j may cancel at a target, so they are added in fp32 before anything
is rounded: the pass over the vocabulary makes -mass s_j of all other entries, and the targets' own
are made from their log-probabilities. While the head is frozen, the forward pass makes `rest`, the
product of the other entries with the head at mass 1, and backward adds K rows of the head to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName

from opsd_kernels import checks
from opsd_kernels.backends.context import vocabulary_shard
from opsd_kernels.backends.logprob_terms import restore_infinity
from opsd_kernels.ops import kept
from opsd_kernels.ops.common import (
    GRADS,
    HOST_READS,
    SumOutputs,
    backend_name,
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
    scale_cast,
    scaled_grads,
    sum_outputs,
    whole_vocabulary,
)
from opsd_kernels.problem import (
    LOGPROB_STATS,
    Execution,
    GradsNeeded,
    Head,
    Kept,
    KnownEntries,
    LogprobProblem,
    Result,
    stat_dtype,
)

_PARAMETERS = ("input", "weight", "bias")


def targets_logprob(
    head: Head, target: Tensor, ignore_index: int, with_stats: bool, e: Execution
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, K), lse (N,), stats (S, N)); the first two are differentiable."""
    needed = grads_needed(head)
    with kept.keeping(needed):
        logprob, lse, stats, _ = targets_tokens(
            head.hidden, head.weight, head.bias, target, head.softcap, head.temperature,
            ignore_index, with_stats, e.schedule, e.workspace_bytes, e.group_name,
            needed.hidden, needed.weight, needed.bias,
        )  # fmt: skip
    return logprob, lse, stats


def _head(a: Mapping[str, Any]) -> Head:
    return Head(*(a[name] for name in (*_PARAMETERS, "softcap", "temperature")))


def _run(
    a: Mapping[str, Any],  # arguments of an operator
    keep: Tensor | None,
    entries: Tensor | None,  # (N, K) dz of raw logits at the targets, None: 0
    mass: Tensor | None,  # (N,), None: 1
    needed: GradsNeeded,
    later: GradsNeeded | None = None,
    from_forward: Kept | None = None,
) -> Result:
    """The pass over the vocabulary: statistics, and gradients of -mass lse but for the targets'."""
    head, target = _head(a), a["target"]
    if keep is not None and bool(keep.all()):
        keep = None
    ids = torch.where(target != a["ignore_index"], target, -1)
    e = Execution(a["schedule"], a["workspace_bytes"], a["group_name"])
    p = LogprobProblem(
        head, ids[:, 0], keep, 0.0, a["with_stats"], e, a["with_stats"],
        known=KnownEntries(ids, entries),
    )  # fmt: skip
    _, _, largest = whole_vocabulary(head, e)
    chosen = plan_for("logprob", head, largest, e, mass, later or needed, from_forward=from_forward)
    extra = kept.arguments(chosen, later, from_forward)
    backend = backend_of(chosen.backend)
    result: Result = backend.logprob(p, chosen, mass, None, None, needed, **extra)
    return result


# ---------------------------------------------------------------------------------------- operators


@torch.library.custom_op("opsd_kernels::targets_tokens", mutates_args=(), tags=HOST_READS)
def targets_tokens(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,  # (N, K)
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    with_stats: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities (N, K), lse (N,), stats (S, N), rest (N, D)).

    `rest` is the gradient of -lse by the hidden states less the targets' terms, of a frozen head.
    """
    a = locals()
    in_backward = grad_weight or grad_bias
    needed = GradsNeeded(hidden=grad_hidden and not in_backward)
    later = kept.wanted(group_name) if in_backward else None
    head, valid = _head(a), target != ignore_index
    with backend_scope(input):
        checks.refuse_in_capture(input, target=target)
        e = Execution(schedule, workspace_bytes, group_name)
        _, vocab_size, _ = whole_vocabulary(head, e)
        checks.distinct_targets(target, valid, vocab_size)
        result = _run(a, valid.any(-1), None, None, needed, later)
        kept.put(result.kept)
        lse = result.stats[LOGPROB_STATS.index("lse")].clone()
    assert result.known_logits is not None  # there are no entries yet
    logprob = restore_infinity(result.known_logits - lse.unsqueeze(-1))
    logprob = torch.where(valid, logprob, 0)
    return logprob, lse, result.stats, or_empty(result.grad_hidden, lse)


@torch.library.custom_op("opsd_kernels::targets_sum", mutates_args=(), tags=HOST_READS)
def targets_sum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor | None,
    entries: Tensor,  # (N, K) dz of raw logits at the targets
    mass: Tensor,  # (N,)
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    with_stats: bool,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As divergence_sum: the gradients of a trained head."""
    a = locals()
    needed = GradsNeeded(grad_hidden, grad_weight, grad_bias)
    with backend_scope(input):
        return sum_outputs(_run(a, keep, entries, mass, needed), mass)


@torch.library.custom_op("opsd_kernels::targets_grad", mutates_args=())
def targets_grad(
    rest: Tensor,  # (N, D)
    weight: Tensor,
    target: Tensor,
    entries: Tensor,  # (N, K) dz of raw logits at the targets, 0 where they are ignored
    mass: Tensor,  # (N,)
    group_name: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """mass * rest + sum_k entries_k weight[target_k], (N, D): the gradient of a frozen head."""
    with backend_scope(rest):
        first = 0 if group_name is None else vocabulary_shard(weight, group_name)[0]
        sums = entries.new_zeros(rest.shape)
        backend_of(backend_name(weight)).add_target_sums(sums, entries, weight, target - first)
        if group_name is not None:
            dist.all_reduce(sums, group=_resolve_process_group(GroupName(group_name)))
    sums += scale_cast(rest, mass, sums.dtype)
    return sums.to(dtype)


@targets_tokens.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    a = by_name("targets_tokens", inputs)
    h, in_backward = a["input"], a["grad_weight"] or a["grad_bias"]
    logprob = h.new_empty(a["target"].shape, dtype=stat_dtype(h.dtype))
    return (
        logprob,
        logprob.new_empty(h.shape[0]),
        logprob.new_empty(len(LOGPROB_STATS), h.shape[0]),
        fake_grad(h, a["grad_hidden"] and not in_backward),
    )


@targets_sum.register_fake
def _(*inputs: Any) -> SumOutputs:
    a = by_name("targets_sum", inputs)
    return fake_sum_outputs(a["input"], a["weight"], len(LOGPROB_STATS), a)


@targets_grad.register_fake
def _(*inputs: Any) -> Tensor:
    a = by_name("targets_grad", inputs)
    rest: Tensor = a["rest"]
    return rest.new_empty(rest.shape, dtype=a["dtype"])


# ----------------------------------------------------------------------------------------- autograd


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = by_name("targets_tokens", inputs)
    logprob, lse, stats, rest = output
    ctx.in_backward = a["grad_weight"] or a["grad_bias"]
    ctx.dtypes = parameter_dtypes(a, _PARAMETERS)
    ctx.numbers = {n: v for n, v in a.items() if n not in (*_PARAMETERS, "target")}
    ctx.kept = kept.take()
    input, bias = (a["input"], a["bias"]) if ctx.in_backward else (None, None)
    ctx.save_for_backward(input, a["weight"], bias, a["target"], logprob, lse, rest)
    ctx.mark_non_differentiable(stats, rest)
    ctx.set_materialize_grads(False)


def _entries(
    ctx: Any, target: Tensor, logprob: Tensor, lse: Tensor, g: Tensor | None, g_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dz of raw logits at the targets (N, K), mass (N,)); 0 for ignored targets, even if NaN."""
    n = ctx.numbers
    valid = target != n["ignore_index"]
    g = torch.zeros_like(logprob) if g is None else torch.where(valid, g, 0)
    mass = g.sum(-1)
    if g_lse is not None:
        mass = mass - torch.where(valid.any(-1), g_lse, 0)
    dz = g - mass.unsqueeze(-1) * logprob.exp()
    if n["softcap"] is not None:
        capped = (logprob + lse.unsqueeze(-1)) * (n["temperature"] / n["softcap"])
        dz = dz * (1 - capped.square())
    return torch.where(valid, dz / n["temperature"], 0), mass


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_logprob is None and grad_lse is None:
        return in_order("targets_tokens", {})
    refuse_double_backward()
    input, weight, bias, target, logprob, lse, rest = ctx.saved_tensors
    entries, mass = _entries(ctx, target, logprob, lse, grad_logprob, grad_lse)
    n = ctx.numbers
    if not ctx.in_backward:
        dh = targets_grad(rest, weight, target, entries, mass, n["group_name"], ctx.dtypes["input"])
        return in_order("targets_tokens", {"input": dh})
    a = {"input": input, "weight": weight, "bias": bias, "target": target, **n}
    from_forward, ctx.kept = ctx.kept, None
    keep = (target != n["ignore_index"]).any(-1)
    rows = keep_with_upstream(keep, n["group_name"], mass, entries.abs().sum(-1))
    if from_forward is not None and kept.same_rows(keep, rows):
        needed = GradsNeeded(*(a[flag] for flag in GRADS))
        with backend_scope(input):
            result = _run(a, keep, entries, mass, needed, None, from_forward)
        *made, scale = gradients_of(result)
        return in_order("targets_tokens", scaled_grads(made, scale, ctx.dtypes))
    a = {**a, "with_stats": False, "keep": rows, "entries": entries, "mass": mass}
    _, _, _, *grads, scale = targets_sum(**a)
    return in_order("targets_tokens", scaled_grads(grads, scale, ctx.dtypes))


targets_tokens.register_autograd(_backward, setup_context=_setup)
