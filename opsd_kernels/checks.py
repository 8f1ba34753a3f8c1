"""Checks of single arguments: each raises an error that names the argument and the fix.

They need no data and also run while torch.compile traces, except `labels_in_vocabulary`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels.plan import PRECISIONS, SCHEDULES
from opsd_kernels.problem import Execution
from opsd_kernels.transforms import reverse_mode_only

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")


def execution(
    schedule: str,
    workspace_bytes: int | None,
    process_group: ProcessGroup | None,
    precision: str = "auto",
) -> Execution:
    """Validate the arguments that say how to run a loss."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a positive number, got {workspace_bytes}")
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup, "
            f"got {type(process_group).__name__}"
        )
    group_name = None if process_group is None else process_group.group_name
    return Execution(schedule, workspace_bytes, group_name, precision)


def reduction_arguments(
    reduction: str, num_tokens: float | Tensor | None, device: torch.device
) -> None:
    """Validate `reduction` and the divisor of the mean of values on `device`."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}")
    if num_tokens is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'num_tokens: only divides reduction="mean", got reduction={reduction!r}; '
            "divide the sum yourself or drop num_tokens"
        )
    if isinstance(num_tokens, Tensor):
        if num_tokens.numel() != 1:
            raise ValueError(
                f"num_tokens: expected a number or a tensor of one element, got shape "
                f"{tuple(num_tokens.shape)}"
            )
        if num_tokens.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"num_tokens: expected on {device} or the CPU, got {num_tokens.device}"
            )
        if num_tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading it would stall the device, or break the graph
    if not num_tokens > 0:
        raise ValueError(f"num_tokens: expected a positive number, got {num_tokens}")


def refuse_in_capture(like: object, **read: object | None) -> None:
    """Raise if a CUDA graph captures the call and an argument of `read`, read on the host, is set.

    `like` tells the device.
    """
    if not isinstance(like, Tensor) or not like.is_cuda or torch.compiler.is_compiling():
        return
    if not torch.cuda.is_current_stream_capturing():
        return
    for name, value in read.items():
        if value is not None:
            raise RuntimeError(
                f"{name}: is read on the host, which a CUDA graph cannot capture; call the loss "
                "without it, or outside torch.cuda.graph"
            )


def same_tokens(student_input: Tensor, teacher_input: Tensor) -> None:
    """Both models must score the same tokens."""
    if student_input.shape[:-1] != teacher_input.shape[:-1]:
        raise ValueError(
            f"teacher_input: expected leading shape {tuple(student_input.shape[:-1])} as "
            f"student_input has, got {tuple(teacher_input.shape[:-1])}"
        )


def shared_vocabulary(
    student_weight: Tensor, teacher_weight: Tensor, vocab_size: int | None
) -> int | None:
    """`vocab_size`, checked against the rows of both heads."""
    sizes = student_weight.shape[0], teacher_weight.shape[0]
    if vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"teacher_weight: has {sizes[1]} vocabulary rows, student_weight {sizes[0]}; if one "
            "is padded, pass vocab_size, the real vocabulary both share"
        )
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise ValueError(
            f"vocab_size: expected 1 to {min(sizes)}, the rows of the smaller head, got "
            f"{vocab_size}"
        )
    return vocab_size


def token_values(
    name: str, value: Tensor, like_name: str, shape: torch.Size, device: torch.device
) -> None:
    """`value` must be a constant floating-point tensor with one value per token of `like_name`."""
    constant(name, value)
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, one value per token of {like_name}, "
            f"got {tuple(value.shape)}"
        )
    same_device(name, value, like_name, device)


def several_targets(target: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """The targets (..., K) as int64 (N, K), checked to be integers and at least one per token."""
    integers("target", target)
    if target.shape[:-1] != shape or target.shape[-1] == 0:
        raise ValueError(
            f"target: expected shape {tuple(shape)} or {(*shape, 'K')} with K targets per token, "
            f"got {tuple(target.shape)}"
        )
    same_device("target", target, "the hidden states", device)
    return target.reshape(-1, target.shape[-1]).long()


def integers(name: str, value: Tensor) -> None:
    """`value` must be a plain tensor of integers."""
    tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")


def flat_labels(name: str, labels: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """The labels as int64 (N,), checked to be integers of the given leading shape."""
    integers(name, labels)
    if labels.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, one label per token, got {tuple(labels.shape)}"
        )
    same_device(name, labels, "the hidden states", device)
    return labels.reshape(-1).long()


def class_weight_of(class_weight: Tensor, vocab_size: int) -> None:
    """There must be one weight per entry of the whole vocabulary."""
    if class_weight.shape != (vocab_size,):
        raise ValueError(
            f"class_weight: expected shape ({vocab_size},), one weight per entry of the whole "
            f"vocabulary, got {tuple(class_weight.shape)}"
        )


def labels_in_vocabulary(
    name: str, labels: Tensor, keep: Tensor | None, vocab_size: int
) -> Tensor | None:
    """`keep`, or None if it keeps every token; raises for a kept label outside [0, vocab_size).

    Reads the data, once: a device waits for the host meanwhile.
    """
    outside = (labels < 0) | (labels >= vocab_size)
    if keep is not None:
        outside &= keep
    answers = [outside.any()] if keep is None else [outside.any(), keep.all()]
    any_outside, *all_kept = torch.stack(answers).tolist()
    if any_outside:
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{name}: expected values in [0, {vocab_size}) or ignore_index, got "
            f"{int(labels[row])} at token {row}"
        )
    return None if all_kept == [True] else keep


def distinct_targets(target: Tensor, valid: Tensor, vocab_size: int) -> None:
    """Targets (N, K) of the mask `valid` must lie in [0, vocab_size), and differ in each row.

    Reads the data, once.
    """
    outside = valid & ((target < 0) | (target >= vocab_size))
    others = -1 - torch.arange(target.shape[1], device=target.device)
    ordered = torch.where(valid, target, others).sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    any_outside, any_twice = torch.stack([outside.any(), twice.any()]).tolist()
    if any_outside:
        row, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"target: expected values in [0, {vocab_size}) or ignore_index, got "
            f"{int(target[row, k])} at token {row}"
        )
    if any_twice:
        row, k = twice.nonzero()[0].tolist()
        raise ValueError(
            f"target: expected distinct ids for each token, got {int(ordered[row, k])} twice at "
            f"token {row}"
        )


def floating_dtype(name: str, value: Tensor) -> None:
    """Raises TypeError unless the dtype is one that the losses compute in."""
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")


def constant(name: str, value: Tensor) -> None:
    """`value` must be a floating-point tensor that needs no gradient."""
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(
            f"{name}: requires_grad, but it is a constant of the loss; pass {name}.detach()"
        )
    reverse_mode_only(name, value)


def tensor(name: str, value: object) -> None:
    """`value` must be a plain torch.Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: is a DTensor; under FSDP2 call the loss inside a forward of the module that "
            "owns it (register_fsdp_forward_method), where it is a plain tensor; a frozen one may "
            "be passed as full_tensor()"
        )


def positive(name: str, value: float) -> None:
    """Raises ValueError unless the number is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def same_device(name: str, value: Tensor, like_name: str, device: torch.device) -> None:
    """Raises ValueError unless the tensor is on the device of `like_name`."""
    if value.device != device:
        raise ValueError(f"{name}: expected on {device} as {like_name}, got {value.device}")
