"""What the operators of both families share: planning, fake outputs and scaled gradients."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.backends import blocked_torch, cpp_backend
from opsd_kernels.backends.context import vocabulary_shard
from opsd_kernels.backends.precision import named_refusals
from opsd_kernels.plan import Plan, default_backend, plan
from opsd_kernels.problem import Execution, GradsNeeded, Head, Result, kept_dtype, stat_dtype

_SLICE_ELEMENTS = 2**20
# Labels are checked, and their rows compacted, on the host: inductor must leave these operators
# out of the CUDA graphs it captures.
HOST_READS = (torch.Tag.cudagraph_unsafe,)
GRADS = ("grad_hidden", "grad_weight", "grad_bias")


@functools.cache
def argument_names(operator: str) -> tuple[str, ...]:
    """Names of a registered operator's arguments, in the order of its schema."""
    schema = getattr(torch.ops.opsd_kernels, operator).default._schema
    return tuple(argument.name for argument in schema.arguments)


def by_name(operator: str, inputs: Sequence[Any]) -> dict[str, Any]:
    """The inputs of a registered operator by the names of its schema."""
    return dict(zip(argument_names(operator), inputs, strict=True))


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


def backend_of(chosen: Plan) -> ModuleType:
    """The plan's backend."""
    if chosen.backend == "triton":  # not needed, nor always there, elsewhere
        return importlib.import_module("opsd_kernels.backends.triton_backend")
    return cpp_backend if chosen.backend == "cpp" else blocked_torch


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton supports the device; says once what is missing."""
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
) -> Plan:
    """The plan of one operator call."""
    return plan(
        *head.hidden.shape, vocab_size,
        loss=loss, dtype=head.hidden.dtype,
        teacher_dtype=None if teacher is None else teacher.hidden.dtype,
        device=head.hidden.device,
        backend=backend_name(head.hidden, None if teacher is None else teacher.hidden),
        grad_input=needed.hidden, grad_weight=needed.weight, grad_bias=needed.bias,
        reduced=row_scale is not None, entropy_grad=needed.entropy, two_passes=two_passes,
        clipped=clipped, workspace_bytes=e.workspace_bytes,
        schedule=e.schedule, precision=e.precision,
    )  # fmt: skip


def whole_vocabulary(head: Head, e: Execution) -> tuple[int, int, int]:
    """(first entry of this shard, entries over all shards, entries of the largest shard)."""
    if e.group_name is None:
        return 0, head.weight.shape[0], head.weight.shape[0]
    return vocabulary_shard(head.weight, e.group_name)


@contextlib.contextmanager
def dispatched(hidden: Tensor) -> Iterator[None]:
    """Where a backend runs: on the device of its tensors, which Triton takes from the current one.

    Operands were cast by `checks`; inside, every product names its own dtypes.
    """
    no_autocast = torch.autocast(hidden.device.type, enabled=False)
    with torch.cuda.device_of(hidden), no_autocast, named_refusals():
        yield


def wanted(head: Head) -> GradsNeeded:
    """The gradients that autograd will ask for."""
    if not torch.is_grad_enabled():
        return GradsNeeded()
    bias = head.bias is not None and head.bias.requires_grad
    return GradsNeeded(head.hidden.requires_grad, head.weight.requires_grad, bias)


def or_empty(grad: Tensor | None, value: Tensor) -> Tensor:
    """Operators return tensors only; a gradient nobody asked for is empty."""
    return value.new_empty(0) if grad is None else grad


def fake_grad(h: Tensor, present: bool) -> Tensor:
    """Fake of an optional gradient of the hidden states."""
    shape, dtype = (h.shape, kept_dtype(h.dtype)) if present else (0, stat_dtype(h.dtype))
    return h.new_empty(shape, dtype=dtype)


def summed(result: Result, row_scale: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a `*_sum` operator."""
    grads = (result.grad_hidden, result.grad_weight, result.grad_bias)
    return (
        (result.value * row_scale).sum(),
        result.value,
        result.stats,
        *(or_empty(grad, result.value) for grad in grads),
        result.scale,
    )


def fake_sum(h: Tensor, w: Tensor, stats: int, flags: Sequence[bool]) -> tuple[Tensor, ...]:
    """Fake outputs of a `*_sum` operator."""
    value = h.new_empty(h.shape[0], dtype=stat_dtype(h.dtype))
    return (
        value.new_empty(()),
        value,
        value.new_empty(stats, h.shape[0]),
        fake_grad(h, flags[0]),
        value.new_empty(w.shape if flags[1] else 0),
        value.new_empty(w.shape[0] if flags[2] else 0),
        value.new_empty(()),
    )


def wanted_dtypes(arguments: dict[str, Any], parameters: Sequence[str]) -> list[torch.dtype | None]:
    """Dtype of each parameter whose gradient is wanted, None for the others."""
    return [
        arguments[name].dtype if arguments[flag] else None
        for name, flag in zip(parameters, GRADS, strict=True)
    ]


def save_sum(ctx: Any, dtypes: list[torch.dtype | None], output: tuple) -> None:
    """Keep what the backward of a `*_sum` operator scales."""
    ctx.dtypes = dtypes
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def sum_backward(operator: str, ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    """Backward of a `*_sum` operator."""
    if grad_loss is None:
        return in_order(operator, [])
    refuse_double_backward()
    *grads, scale = ctx.saved_tensors
    return in_order(operator, scaled_grads(grads, scale * grad_loss, ctx.dtypes))


def scaled_grads(
    grads: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """Each wanted gradient times factor, rounded once to its parameter's dtype."""
    return [
        None if dtype is None else scale_cast(grad, factor, dtype)
        for grad, dtype in zip(grads, dtypes, strict=True)
    ]


def at_kept(upstream: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """The upstream of tokens that were kept, 0 for the others: even NaN does not reach them."""
    if upstream is None or keep is None:
        return upstream
    return torch.where(keep, upstream, 0)


def still_kept(
    keep: Tensor | None, group_name: str | None, *upstreams: Tensor | None
) -> Tensor | None:
    """Kept tokens whose upstream is not 0: the others have no gradient, even of NaN values."""
    # Without a mask this would read the upstream on the host; ranks must compute the same rows.
    if keep is None or group_name is not None:
        return keep
    flowing = [upstream != 0 for upstream in upstreams if upstream is not None]
    return keep & functools.reduce(torch.logical_or, flowing)


def in_order(operator: str, grads: Sequence[Tensor | None]) -> tuple:
    """Gradients in argument order: the student's hidden, weight and bias come first."""
    return (*grads, *(None,) * (len(argument_names(operator)) - len(grads)))


def refuse_double_backward() -> None:
    """The gradients were made in forward; their own derivatives are not known."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "opsd_kernels losses are differentiable once; create_graph=True is not supported"
        )


@torch.library.custom_op("opsd_kernels::scale_cast", mutates_args=())
def scale_cast(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`; no second copy of a large gradient in fp32.

    factor is a scalar or has one entry per row of grad; a row's factor of 0 makes 0 of NaN too.
    """
    out = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    if grad.is_cuda and backend_name(grad) == "triton":
        from opsd_kernels.backends.triton_scale import scale_into

        scale_into(grad.contiguous(), factor, out)
        return out
    _scaled_in_slices(grad, factor, out)
    return out if factor.ndim == 0 else out.masked_fill_((factor == 0).unsqueeze(-1), 0)


def _scaled_in_slices(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """PyTorch casts in a second pass over a buffer, here one of a slice's size."""
    rows = max(1, _SLICE_ELEMENTS // max(1, grad[:1].numel()))
    for first in range(0, grad.shape[0], rows):
        part = slice(first, first + rows)
        scale = factor if factor.ndim == 0 else factor[part].unsqueeze(-1)
        out[part] = grad[part] * scale
    return out


@scale_cast.register_fake
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)
