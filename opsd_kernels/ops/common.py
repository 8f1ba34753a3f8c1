"""What the operators of both families share: planning, fake outputs and scaled gradients."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from opsd_kernels.backends import blocked_torch, cpp_backend
from opsd_kernels.backends.context import vocabulary_shard
from opsd_kernels.backends.precision import named_refusals
from opsd_kernels.plan import Plan, default_backend, plan
from opsd_kernels.problem import (
    Execution,
    GradsNeeded,
    Head,
    Kept,
    Result,
    kept_dtype,
    stat_dtype,
    weight_grad_dtype,
)

_SLICE_ELEMENTS = 2**20
# Labels are checked, and their rows compacted, on the host: inductor must leave these operators
# out of the CUDA graphs it captures.
HOST_READS = (torch.Tag.cudagraph_unsafe,)
# Arguments of an operator that ask for the gradients of its hidden states, weight and bias.
GRADS = ("grad_hidden", "grad_weight", "grad_bias")

# loss, value, stats, d hidden, d weight, d bias, scale
SumOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# ------------------------------------------------------------------------ arguments by their names


@functools.cache
def argument_names(operator: str) -> tuple[str, ...]:
    """Names of a registered operator's arguments, in the order of its schema."""
    schema = getattr(torch.ops.opsd_kernels, operator).default._schema
    return tuple(argument.name for argument in schema.arguments)


def by_name(operator: str, inputs: Sequence[Any]) -> dict[str, Any]:
    """The inputs of a registered operator by the names of its schema."""
    return dict(zip(argument_names(operator), inputs, strict=True))


def in_order(operator: str, grads: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """What a backward returns: gradients by name in the order of the schema, None for the rest."""
    return tuple(grads.get(name) for name in argument_names(operator))


# ------------------------------------------------------------------------------ backends and plans


def backend_name(hidden: Tensor, teacher: Tensor | None = None) -> str:
    """Triton on a GPU, and on the CPU under its interpreter; else C++, else blocked PyTorch."""
    teacher_dtype = hidden.dtype if teacher is None else teacher.dtype
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") == "1":
        if hidden.dtype == torch.bfloat16:
            raise TypeError(
                "TRITON_INTERPRET=1: Triton's interpreter computes bfloat16 wrongly; use float32 "
                "or float16, or unset it"
            )
        return "torch" if hidden.dtype == torch.float64 else "triton"
    name = default_backend(hidden.device, hidden.dtype, teacher_dtype)
    return "torch" if name == "triton" and not _triton_runs(hidden.device) else name


def backend_of(name: str) -> ModuleType:
    """The module of a backend by its name in a plan."""
    if name == "triton":  # imported only here: Triton may not be installed
        return importlib.import_module("opsd_kernels.backends.triton_backend")
    return cpp_backend if name == "cpp" else blocked_torch


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton supports the device; warns once about what is missing."""
    missing = None
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        missing = "a CUDA device of compute capability 8.0 or higher"
    elif importlib.util.find_spec("triton") is None:
        missing = "Triton (pip install triton)"
    if missing:
        warnings.warn(f"opsd_kernels runs in plain PyTorch: it needs {missing}", stacklevel=2)
    return missing is None


def plan_for(
    loss: str,
    head: Head,
    vocab_size: int,
    e: Execution,
    row_scale: Tensor | None,
    needed: GradsNeeded,
    teacher: Head | None = None,
    two_passes: bool = True,
    clipped: bool = False,
    k: int = 0,
    from_forward: Kept | None = None,
) -> Plan:
    """The plan of one operator call: that of the forward pass whose logits it goes on from."""
    if from_forward is not None:
        return from_forward.plan
    num_tokens, hidden_size = head.hidden.shape
    return plan(
        num_tokens, hidden_size, vocab_size,
        loss=loss, dtype=head.hidden.dtype,
        teacher_dtype=None if teacher is None else teacher.hidden.dtype,
        device=head.hidden.device,
        backend=backend_name(head.hidden, None if teacher is None else teacher.hidden),
        grad_input=needed.hidden, grad_weight=needed.weight, grad_bias=needed.bias,
        reduced=row_scale is not None, entropy_grad=needed.entropy, two_passes=two_passes,
        clipped=clipped, k=k, workspace_bytes=e.workspace_bytes,
        schedule=e.schedule, precision=e.precision,
    )  # fmt: skip


def whole_vocabulary(head: Head, e: Execution) -> tuple[int, int, int]:
    """(first entry of this shard, entries over all shards, entries of the largest shard)."""
    if e.group_name is None:
        return 0, head.weight.shape[0], head.weight.shape[0]
    return vocabulary_shard(head.weight, e.group_name)


@contextlib.contextmanager
def backend_scope(hidden: Tensor) -> Iterator[None]:
    """Run a backend on the device of its tensors (Triton launches on the current one), no autocast.

    `checks` has cast the operands; inside, every product names its own dtypes.
    """
    no_autocast = torch.autocast(hidden.device.type, enabled=False)
    with torch.cuda.device_of(hidden), no_autocast, named_refusals():
        yield


# --------------------------------------------------------------------------------------- gradients


def grads_needed(head: Head) -> GradsNeeded:
    """The gradients that autograd will ask for."""
    if not torch.is_grad_enabled():
        return GradsNeeded()
    bias = head.bias is not None and head.bias.requires_grad
    return GradsNeeded(head.hidden.requires_grad, head.weight.requires_grad, bias)


def or_empty(grad: Tensor | None, value: Tensor) -> Tensor:
    """The gradient, or an empty tensor if there is none: operators return only tensors."""
    return value.new_empty(0) if grad is None else grad


def fake_grad(h: Tensor, present: bool) -> Tensor:
    """Fake of an optional gradient of the hidden states."""
    if not present:
        return h.new_empty(0, dtype=stat_dtype(h.dtype))
    return h.new_empty(h.shape, dtype=kept_dtype(h.dtype))


def _fake_weight_grad(w: Tensor) -> Tensor:
    return w.new_empty(w.shape, dtype=weight_grad_dtype(w))


def sum_outputs(result: Result, row_scale: Tensor) -> SumOutputs:
    """Outputs of a `*_sum` operator."""
    dh, dw, db, scale = gradients_of(result)
    return (result.value * row_scale).sum(), result.value, result.stats, dh, dw, db, scale


def gradients_of(result: Result) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d hidden, d weight, d bias, scale) of a result with scales, empty where there is none."""
    assert result.scale is not None, "a result without row_scale"
    grads = result.grad_hidden, result.grad_weight, result.grad_bias
    dh, dw, db = (or_empty(grad, result.value) for grad in grads)
    return dh, dw, db, result.scale


def fake_sum_outputs(h: Tensor, w: Tensor, stats: int, a: Mapping[str, Any]) -> SumOutputs:
    """Fake outputs of a `*_sum` operator with the arguments `a`."""
    value = h.new_empty(h.shape[0], dtype=stat_dtype(h.dtype))
    return (
        value.new_empty(()),
        value,
        value.new_empty(stats, h.shape[0]),
        fake_grad(h, a["grad_hidden"]),
        w.new_empty(w.shape, dtype=weight_grad_dtype(w))
        if a["grad_weight"]
        else value.new_empty(0),
        value.new_empty(w.shape[0] if a["grad_bias"] else 0),
        value.new_empty(()),
    )


def parameter_dtypes(
    a: Mapping[str, Any], parameters: Sequence[str]
) -> dict[str, torch.dtype | None]:
    """Dtype of each parameter whose gradient is needed, None for the others."""
    return {
        name: a[name].dtype if a[flag] else None
        for name, flag in zip(parameters, GRADS, strict=True)
    }


def save_sum(
    ctx: Any, dtypes: Mapping[str, torch.dtype | None], output: tuple[Tensor, ...]
) -> None:
    """Save the gradients that the backward of a `*_sum` operator scales."""
    _, value, stats, *grads, scale = output
    ctx.dtypes = dtypes
    ctx.save_for_backward(*grads, scale)
    ctx.mark_non_differentiable(value, stats, *grads, scale)
    ctx.set_materialize_grads(False)


def sum_backward(
    operator: str, ctx: Any, grad_loss: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    """Backward of a `*_sum` operator."""
    if grad_loss is None:
        return in_order(operator, {})
    refuse_double_backward()
    *grads, scale = ctx.saved_tensors
    return in_order(operator, scaled_grads(grads, scale * grad_loss, ctx.dtypes))


def scaled_grads(
    grads: Sequence[Tensor], factor: Tensor, dtypes: Mapping[str, torch.dtype | None]
) -> dict[str, Tensor | None]:
    """Each needed gradient times factor, in the dtype of its parameter."""
    return {
        name: None if dtype is None else _scaled(grad, factor, dtype)
        for grad, (name, dtype) in zip(grads, dtypes.items(), strict=True)
    }


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor; the same memory on a CPU, if this backward is the last to read it."""
    eager = type(grad) is Tensor and not torch.compiler.is_compiling()
    if grad.is_cpu and eager and grad.dtype == dtype and not _get_current_graph_task_keep_graph():
        number = factor.item()
        return grad if number == 1.0 else grad.mul_(number)
    scaled: Tensor = scale_cast(grad, factor, dtype)
    return scaled


def zero_dropped(upstream: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """The upstream gradient of kept tokens, 0 for the others, even where it is NaN."""
    if upstream is None or keep is None:
        return upstream
    return torch.where(keep, upstream, 0)


def keep_with_upstream(
    keep: Tensor | None, group_name: str | None, *upstreams: Tensor | None
) -> Tensor | None:
    """The kept tokens with an upstream gradient: NaN values of the others reach no gradient."""
    # Without a mask this would read the upstream on the host; ranks must compute the same rows.
    if keep is None or group_name is not None:
        return keep
    nonzero = [upstream != 0 for upstream in upstreams if upstream is not None]
    return keep & functools.reduce(torch.logical_or, nonzero)


def refuse_double_backward() -> None:
    """Raise under create_graph: the gradients made in forward have no derivatives of their own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "opsd_kernels losses are differentiable once; create_graph=True is not supported"
        )


@torch.library.custom_op("opsd_kernels::scale_cast", mutates_args=())
def scale_cast(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`, without a second copy of a large gradient in fp32.

    factor is a scalar or has one entry per row of grad; a row with factor 0 becomes 0 even if NaN.
    """
    out = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    if grad.is_cuda and backend_name(grad) == "triton":
        from opsd_kernels.backends.triton_scale import scale_into

        scale_into(grad.contiguous(), factor, out)
        return out
    _scaled_in_slices(grad, factor, out)
    return out if factor.ndim == 0 else out.masked_fill_((factor == 0).unsqueeze(-1), 0)


def _scaled_in_slices(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out <- grad * factor in slices: PyTorch casts from a buffer, here of a slice's size."""
    rows = max(1, _SLICE_ELEMENTS // max(1, grad[:1].numel()))
    for first in range(0, grad.shape[0], rows):
        part = slice(first, first + rows)
        scale = factor if factor.ndim == 0 else factor[part].unsqueeze(-1)
        out[part] = grad[part] * scale
    return out


@scale_cast.register_fake
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)
