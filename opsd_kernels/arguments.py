"""The arguments of the public functions, validated and collected into one problem.

Everything here also runs while torch.compile traces: only shapes, dtypes and numbers are checked.
That labels lie in the vocabulary is checked inside the operator, which may read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_kernels import checks
from opsd_kernels.problem import (
    DivergenceProblem,
    Execution,
    Head,
    LogprobProblem,
    TopkProblem,
    stat_dtype,
)
from opsd_kernels.transforms import reverse_mode_only


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
    checks.refuse_in_capture(
        student_input,
        shift_labels=shift_labels,
        token_weight=token_weight,
        process_group=execution.group_name,
    )
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if token_clip is not None:
        checks.positive("token_clip", token_clip)
    student = _head(
        "student_", student_input, student_weight, student_bias,
        student_softcap, student_logit_scale, temperature,
    )  # fmt: skip
    teacher = _head(
        "teacher_", teacher_input, teacher_weight, teacher_bias,
        teacher_softcap, teacher_logit_scale, temperature,
    )  # fmt: skip
    checks.same_device("teacher_input", teacher_input, "student_input", student_input.device)
    checks.same_tokens(student_input, teacher_input)
    if teacher_weight is student_weight:
        teacher.weight = student.weight  # one cast under autocast, and backends see one head
    _trim_to_vocabulary([student, teacher], vocab_size, execution)
    _detach(teacher)
    keep = flat_labels = None
    if shift_labels is not None:
        flat_labels = checks.flat_labels(
            "shift_labels", shift_labels, student_input.shape[:-1], student_input.device
        )
        keep = flat_labels != ignore_index
    keep = kept_tokens(
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
    """Validate the arguments of the log-probability family; errors name them with `prefix`."""
    checks.refuse_in_capture(input, target=target)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    head = _head(prefix, input, weight, bias, softcap, logit_scale, temperature)
    _trim_to_vocabulary([head], vocab_size, execution)
    shape, device = input.shape[:-1], input.device
    target = checks.flat_labels("target", target, shape, device)
    label_weight = None
    if class_weight is not None:
        checks.constant("class_weight", class_weight)
        # Only the operator knows, and checks, the vocabulary of a sharded head.
        sharded = execution.group_name is not None
        vocab = class_weight.numel() if sharded else head.weight.shape[0]
        checks.class_weight_of(class_weight, vocab)
        checks.same_device("class_weight", class_weight, f"{prefix}input", device)
        head.class_weight = class_weight.to(stat_dtype(head.hidden.dtype)).contiguous()
        label_weight = head.class_weight[target.clamp(0, len(class_weight) - 1)]
    return LogprobProblem(
        head=head,
        target=target,
        keep=kept_tokens(target != ignore_index, token_weight, f"{prefix}input", shape, device),
        label_smoothing=float(label_smoothing),
        with_entropy=with_entropy,
        execution=execution,
        with_predicted=with_predicted,
        label_weight=label_weight,
    )


def several_targets(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int | None,
    execution: Execution,
) -> tuple[Head, Tensor]:
    """The head, and the targets (..., K) as int64 (N, K)."""
    checks.refuse_in_capture(input, target=target)
    head = _head("", input, weight, bias, softcap, logit_scale, temperature)
    _trim_to_vocabulary([head], vocab_size, execution)
    return head, checks.several_targets(target, input.shape[:-1], input.device)


def topk_problem(
    input: Tensor,
    weight: Tensor,
    k: int,
    shift_labels: Tensor | None,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    vocab_size: int | None,
    execution: Execution,
) -> TopkProblem:
    """Validate the arguments of `fused_topk.fused_linear_topk`; the operator compares k with V."""
    checks.refuse_in_capture(input, shift_labels=shift_labels, process_group=execution.group_name)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer from 1 to the vocabulary's size, got {k!r}")
    head = _head("", input, weight, bias, softcap, logit_scale, temperature)
    _trim_to_vocabulary([head], vocab_size, execution)
    _detach(head)
    labels = keep = None
    if shift_labels is not None:
        labels = checks.flat_labels("shift_labels", shift_labels, input.shape[:-1], input.device)
        keep = labels != ignore_index
    return TopkProblem(head, labels, keep, k, ignore_index, execution)


def kept_tokens(
    keep: Tensor | None,
    token_weight: Tensor | None,
    like_name: str,
    shape: torch.Size,
    device: torch.device,
) -> Tensor | None:
    """(N,) mask of the tokens to compute: those of weight 0 are dropped like ignored ones."""
    if token_weight is None:
        return keep
    checks.token_values("token_weight", token_weight, like_name, shape, device)
    nonzero = token_weight.reshape(-1) != 0
    return nonzero if keep is None else keep & nonzero


def _head(
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> Head:
    """Validate one head, cast it under autocast, and fold the logit scale into softcap and T."""
    input_name, weight_name, bias_name = f"{prefix}input", f"{prefix}weight", f"{prefix}bias"
    checks.positive("temperature", temperature)
    checks.positive(f"{prefix}logit_scale", logit_scale)
    _check_shapes(input_name, hidden, weight_name, weight)
    for name, tensor in ((input_name, hidden), (weight_name, weight), (bias_name, bias)):
        if tensor is not None:
            checks.floating_dtype(name, tensor)
            reverse_mode_only(name, tensor)
    hidden, weight = _autocast(hidden), _autocast(weight)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{weight_name}: expected the dtype of {input_name} ({hidden.dtype}), got "
            f"{weight.dtype}; convert one of them or call under torch.autocast"
        )
    if bias is not None:
        checks.tensor(bias_name, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{bias_name}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
        checks.same_device(bias_name, bias, input_name, hidden.device)
    if softcap is not None:
        checks.positive(f"{prefix}softcap", softcap)
        # softcap_c(k x) / T = softcap_(c / k)(x) / (T / k): no backend needs the scale.
        softcap = float(softcap) / float(logit_scale)
    temperature = float(temperature) / float(logit_scale)
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, softcap, temperature)


def _detach(head: Head) -> None:
    head.hidden, head.weight = head.hidden.detach(), head.weight.detach()
    head.bias = None if head.bias is None else head.bias.detach()


def _check_shapes(input_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    checks.tensor(input_name, hidden)
    checks.tensor(weight_name, weight)
    if hidden.ndim < 1 or weight.ndim != 2:
        raise ValueError(
            f"{weight_name}: expected shape (V, D) and {input_name} (..., D), got "
            f"{tuple(weight.shape)} and {tuple(hidden.shape)}"
        )
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name}: expected shape (V, {hidden.shape[-1]}) to match {input_name} "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"{weight_name}: expected at least one vocabulary row and one hidden column, got shape "
            f"{tuple(weight.shape)}"
        )
    checks.same_device(weight_name, weight, input_name, hidden.device)


def _trim_to_vocabulary(heads: list[Head], vocab_size: int | None, execution: Execution) -> None:
    """Cut the heads to the first `vocab_size` rows, the vocabulary they share."""
    checks.shared_vocabulary(heads[0].weight, heads[-1].weight, vocab_size)
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


def _autocast(tensor: Tensor) -> Tensor:
    """The cast that torch.nn.functional.linear makes under autocast."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
