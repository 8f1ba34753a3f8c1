"""Arguments in, one validated problem out; every user-facing error of the package is raised here.

Checks of shapes, dtypes and numbers need no data and also run while torch.compile traces. The one
check that must read values, that labels lie in the vocabulary, runs inside the operator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels.plan import PRECISIONS, SCHEDULES
from opsd_kernels.problem import (
    DivergenceProblem,
    Execution,
    Head,
    LogprobProblem,
    stat_dtype,
)
from opsd_kernels.transforms import reverse_mode_only

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")


def divergence_problem(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None,
    *,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float,
    ignore_index: int,
    token_weight: Tensor | None,
    token_clip: float | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    vocab_size: int | None,
    with_stats: bool,
    execution: Execution,
) -> DivergenceProblem:
    """Validate the arguments of the divergence family; see `fused_jsd.fused_linear_jsd`."""
    outside_capture(
        student_input,
        shift_labels=shift_labels,
        token_weight=token_weight,
        process_group=execution.group_name,
    )
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if token_clip is not None:
        _positive("token_clip", token_clip)
    student = _head(
        "student_", student_input, student_weight, student_bias,
        student_softcap, student_logit_scale, temperature,
    )  # fmt: skip
    teacher = _head(
        "teacher_", teacher_input, teacher_weight, teacher_bias,
        teacher_softcap, teacher_logit_scale, temperature,
    )  # fmt: skip
    _same_place("teacher_input", teacher_input, "student_input", student_input.device)
    same_tokens(student_input, teacher_input)
    if teacher_weight is student_weight:
        teacher.weight = student.weight  # one cast under autocast, and known to be shared
    _cut([student, teacher], vocab_size, execution)
    teacher.hidden, teacher.weight = teacher.hidden.detach(), teacher.weight.detach()
    teacher.bias = None if teacher.bias is None else teacher.bias.detach()
    keep = flat_labels = None
    if shift_labels is not None:
        flat_labels = labels(
            "shift_labels", shift_labels, student_input.shape[:-1], student_input.device
        )
        keep = flat_labels != ignore_index
    keep = weighted(
        keep, token_weight, "student_input", student_input.shape[:-1], student_input.device
    )
    return DivergenceProblem(
        student=student,
        teacher=teacher,
        labels=flat_labels,
        keep=keep,
        beta=float(beta),
        clip=None if token_clip is None else float(token_clip),
        with_stats=with_stats,
        execution=execution,
    )


def logprob_problem(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    vocab_size: int | None,
    with_entropy: bool,
    execution: Execution,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    with_predicted: bool = False,
    prefix: str = "",
) -> LogprobProblem:
    """Validate the arguments of the log-probability family; errors name them with the prefix."""
    outside_capture(input, target=target)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    head = _head(prefix, input, weight, bias, softcap, logit_scale, temperature)
    _cut([head], vocab_size, execution)
    shape, device = input.shape[:-1], input.device
    target = labels("target", target, shape, device)
    label_weight = None
    if class_weight is not None:
        _constant("class_weight", class_weight)
        # Of a sharded head the operator knows the whole vocabulary's size, and checks it.
        sharded = execution.group_name is not None
        class_weight_of(class_weight, class_weight.numel() if sharded else head.weight.shape[0])
        _same_place("class_weight", class_weight, f"{prefix}input", device)
        head.class_weight = class_weight.to(stat_dtype(head.hidden.dtype)).contiguous()
        label_weight = head.class_weight[target.clamp(0, len(class_weight) - 1)]
    return LogprobProblem(
        head=head,
        target=target,
        keep=weighted(target != ignore_index, token_weight, f"{prefix}input", shape, device),
        label_smoothing=float(label_smoothing),
        with_entropy=with_entropy,
        execution=execution,
        with_predicted=with_predicted,
        label_weight=label_weight,
    )


def execution(
    schedule: str,
    workspace_bytes: int | None,
    process_group: ProcessGroup | None,
    precision: str = "auto",
) -> Execution:
    """Validate how the caller wants it run."""
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


def outside_capture(like: object, **read: object | None) -> None:
    """Raise for an argument that is read on the host, if a CUDA graph captures the call."""
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
    """Both models score the same tokens."""
    if student_input.shape[:-1] != teacher_input.shape[:-1]:
        raise ValueError(
            f"teacher_input: expected leading shape {tuple(student_input.shape[:-1])} as "
            f"student_input has, got {tuple(teacher_input.shape[:-1])}"
        )


def shared_vocabulary(
    student_weight: Tensor, teacher_weight: Tensor, vocab_size: int | None
) -> int | None:
    """vocab_size, checked against both heads."""
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
    """A constant floating-point tensor with one value per token of `like_name` (...)."""
    _constant(name, value)
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, one value per token of {like_name}, "
            f"got {tuple(value.shape)}"
        )
    _same_place(name, value, like_name, device)


def class_weight_of(class_weight: Tensor, vocab_size: int) -> None:
    """One weight for each entry of the whole vocabulary."""
    if class_weight.shape != (vocab_size,):
        raise ValueError(
            f"class_weight: expected shape ({vocab_size},), one weight per entry of the whole "
            f"vocabulary, got {tuple(class_weight.shape)}"
        )


def labels_in_vocabulary(name: str, labels: Tensor, keep: Tensor | None, vocab_size: int) -> None:
    """Raise for a kept label outside [0, vocab_size). Reads the data."""
    outside = (labels < 0) | (labels >= vocab_size)
    if keep is not None:
        outside &= keep
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{name}: expected values in [0, {vocab_size}) or ignore_index, got "
            f"{int(labels[row])} at token {row}"
        )


def _head(
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> Head:
    names = [f"{prefix}{name}" for name in ("input", "weight", "bias", "softcap")]
    _positive("temperature", temperature)
    _positive(f"{prefix}logit_scale", logit_scale)
    _tensor(names[0], hidden)
    _tensor(names[1], weight)
    if hidden.ndim < 1 or weight.ndim != 2:
        raise ValueError(
            f"{names[1]}: expected shape (V, D) and {names[0]} (..., D), got "
            f"{tuple(weight.shape)} and {tuple(hidden.shape)}"
        )
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]}: expected shape (V, {hidden.shape[-1]}) to match {names[0]} "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"{names[1]}: expected at least one vocabulary row and one hidden column, got shape "
            f"{tuple(weight.shape)}"
        )
    _same_place(names[1], weight, names[0], hidden.device)
    for name, tensor in zip(names, (hidden, weight, bias), strict=False):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor is not None:
            reverse_mode_only(name, tensor)
    hidden, weight = _autocast(hidden), _autocast(weight)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{names[1]}: expected the dtype of {names[0]} ({hidden.dtype}), got {weight.dtype}; "
            "convert one of them or call under torch.autocast"
        )
    if bias is not None:
        _tensor(names[2], bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
        _same_place(names[2], bias, names[0], hidden.device)
    if softcap is not None:
        _positive(names[3], softcap)
        # softcap_c(k x) / T = softcap_(c / k)(x) / (T / k): no backend needs to know of the scale.
        softcap = float(softcap) / float(logit_scale)
    temperature = float(temperature) / float(logit_scale)
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, softcap, temperature)


def _cut(heads: list[Head], vocab_size: int | None, execution: Execution) -> None:
    """Cut the heads to the shared real vocabulary."""
    shared_vocabulary(heads[0].weight, heads[-1].weight, vocab_size)
    if vocab_size is None:
        return
    if execution.group_name is not None:
        raise ValueError(
            "vocab_size: cannot be combined with process_group; cut the padded rows from the "
            "shard that holds them"
        )
    for head in heads:
        head.weight = head.weight[:vocab_size]
        head.bias = None if head.bias is None else head.bias[:vocab_size]


def labels(name: str, labels: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Integer labels of the given leading shape, flat and int64."""
    _tensor(name, labels)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name}: expected an integer dtype, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, one label per token, got {tuple(labels.shape)}"
        )
    _same_place(name, labels, "the hidden states", device)
    return labels.reshape(-1).long()


def weighted(
    keep: Tensor | None,
    token_weight: Tensor | None,
    like_name: str,
    shape: torch.Size,
    device: torch.device,
) -> Tensor | None:
    """Rows of weight 0 carry no loss and are dropped like masked ones."""
    if token_weight is None:
        return keep
    token_values("token_weight", token_weight, like_name, shape, device)
    nonzero = token_weight.reshape(-1) != 0
    return nonzero if keep is None else keep & nonzero


def _constant(name: str, value: Tensor) -> None:
    _tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(
            f"{name}: requires_grad, but it is a constant of the loss; pass {name}.detach()"
        )
    reverse_mode_only(name, value)


def _tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: is a DTensor; under FSDP2 call the loss inside a forward of the module that "
            "owns it (register_fsdp_forward_method), where it is a plain tensor; a frozen one may "
            "be passed as full_tensor()"
        )


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def _same_place(name: str, value: Tensor, like_name: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected on {device} as {like_name}, got {value.device}")


def _autocast(tensor: Tensor) -> Tensor:
    """What torch.nn.functional.linear does to its operands under autocast."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
