"""Generalized Jensen-Shannon divergence from hidden states and LM-head weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from opsd_kernels import arguments, checks
from opsd_kernels.ops.divergence import divergence
from opsd_kernels.problem import DIVERGENCE_STATS
from opsd_kernels.reduction import row_scale

Stats = dict[str, Tensor]


def fused_linear_jsd(
    student_input: Tensor,  # (..., D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_input: Tensor,  # (..., D_t)
    teacher_weight: Tensor,  # (V, D_t)
    shift_labels: Tensor | None = None,  # (...)
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,  # (...)
    token_clip: float | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    precision: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Divergence of the student from the teacher, without the [tokens, vocabulary] logits.

    Equal to the mean over tokens of ::

        z_s = softcap(k_s * (student_input @ student_weight.T + student_bias)) / temperature
        z_t = softcap(k_t * (teacher_input @ teacher_weight.T + teacher_bias)) / temperature
        s, t = z_s.float().softmax(-1), z_t.float().softmax(-1)
        m = beta * t + (1 - beta) * s
        value = beta * kl(t, m) + (1 - beta) * kl(s, m)     # 0 < beta < 1: JSD
        value = kl(t, s)                                    # beta = 0: forward KL
        value = kl(s, t)                                    # beta = 1: reverse KL

    with kl(p, q) = (p * (p.log() - q.log())).sum(-1) and softcap(x) = c * tanh(x / c). This is
    Equation 7 of the OPSD paper; beta = 0 and 1 are special cases, not limits, as in TRL and
    Liger. There is no factor temperature**2. Only the student gets gradients.

    Args:
        student_input, teacher_input: hidden states in float32, bfloat16, float16 or float64; their
            leading shapes must agree, hidden sizes and dtypes may differ.
        student_weight, teacher_weight: LM heads in the dtype of their hidden states. If both are
            the same tensor, one product makes the logits of both models.
        shift_labels: integer labels, already shifted; tokens equal to `ignore_index` are dropped
            before any product. The other labels are read only for the statistics.
        student_bias, teacher_bias: added to the logits.
        beta: in [0, 1].
        token_weight: multiplies each token's value; a constant. Tokens of weight 0 are dropped
            like ignored ones: NaN or infinity there reaches no value and no gradient.
        token_clip: positive; each vocabulary entry contributes min(entry, token_clip), where an
            entry of the JSD is beta t log(t/m) + (1 - beta) s log(s/m). Values can be negative.
        student_softcap, teacher_softcap: c, in units of logits; None for no softcap.
        student_logit_scale, teacher_logit_scale: k, the factor of a model's logits.
        vocab_size: size of the vocabulary that two heads with different padding share.
        reduction: "mean" divides the weighted sum by `num_tokens`, by default the number of
            tokens not ignored (if all are ignored the loss is 0); "sum"; "none".
        num_tokens: global divisor under gradient accumulation or data parallelism; a number, or
            a tensor of one element on the inputs' device or the CPU.
        schedule, workspace_bytes: see `opsd_kernels.plan`.
        process_group: the rows of the heads are sharded over this group in rank order; values are
            those of the whole vocabulary, and the gradient of the hidden states is summed over
            the group.
        precision: how logits are stored between passes: "auto" lets the plan choose, "fp32", or
            "difference" for 16-bit differences; see `opsd_kernels.plan`.
        return_stats: also return detached, unweighted tensors (...): divergence, student_entropy,
            teacher_entropy; student_logprob and teacher_logprob of the label if there are labels;
            clipped_mass (value without the clip minus value) if there is a clip. They are 0 for
            dropped tokens, and need no further product.

    Returns:
        The loss, a scalar or (...) for reduction "none"; with return_stats (loss, statistics).
        All fp32, or fp64 for fp64 inputs. A KL whose supports are disjoint is infinite; its
        gradient stays finite.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it expects.
        RuntimeError: under forward-mode or double differentiation; and while a CUDA graph is
            captured, if an argument is read on the host (labels, weights, a process group).
    """
    problem = arguments.divergence_problem(
        student_input, student_weight, teacher_input, teacher_weight, shift_labels,
        student_bias=student_bias, teacher_bias=teacher_bias, beta=beta, temperature=temperature,
        ignore_index=ignore_index, token_weight=token_weight, token_clip=token_clip,
        student_softcap=student_softcap, teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale, teacher_logit_scale=teacher_logit_scale,
        vocab_size=vocab_size, with_stats=return_stats,
        execution=checks.execution(schedule, workspace_bytes, process_group, precision),
    )  # fmt: skip
    checks.reduction_arguments(reduction, num_tokens, problem.student.hidden.device)
    counted = None if problem.labels is None else problem.labels != ignore_index
    scale = row_scale(
        problem.student.hidden, counted, problem.keep, token_weight, reduction, num_tokens
    )
    loss, value, stats = divergence(problem, scale, reduced=reduction != "none")
    shape = student_input.shape[:-1]
    if reduction == "none":
        loss = loss.reshape(shape)
    if not return_stats:
        return loss
    named = {"divergence": value.reshape(shape)}
    for name, row in zip(DIVERGENCE_STATS, stats, strict=True):
        absent = (name == "clipped_mass" and token_clip is None) or (
            name.endswith("_logprob") and shift_labels is None
        )
        if not absent:
            named[name] = row.reshape(shape)
    return loss, named


class FusedLinearJSD(nn.Module):
    """`fused_linear_jsd` as a module, with the call order of Liger's `LigerFusedLinearJSD`.

    The options are those of the function, and attributes; `jsd_beta` is its `beta`. `accum_dtype`
    exists for compatibility with Liger and is ignored: sums are fp32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        *,
        token_clip: float | None = None,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        vocab_size: int | None = None,
        reduction: str = "mean",
        schedule: str = "auto",
        workspace_bytes: int | None = None,
        process_group: ProcessGroup | None = None,
        precision: str = "auto",
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(accum_dtype, torch.dtype | None):
            raise TypeError(
                f"accum_dtype: expected a torch.dtype or None, got {type(accum_dtype).__name__}"
            )
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype
        self.token_clip = token_clip
        self.student_softcap = student_softcap
        self.teacher_softcap = teacher_softcap
        self.student_logit_scale = student_logit_scale
        self.teacher_logit_scale = teacher_logit_scale
        self.vocab_size = vocab_size
        self.reduction = reduction
        self.schedule = schedule
        self.workspace_bytes = workspace_bytes
        self.process_group = process_group
        self.precision = precision
        self.return_stats = return_stats

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: torch.LongTensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_tokens: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss, as `fused_linear_jsd` returns it."""
        return fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            token_weight=token_weight,
            num_tokens=num_tokens,
            beta=self.jsd_beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            token_clip=self.token_clip,
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
            student_logit_scale=self.student_logit_scale,
            teacher_logit_scale=self.teacher_logit_scale,
            vocab_size=self.vocab_size,
            reduction=self.reduction,
            schedule=self.schedule,
            workspace_bytes=self.workspace_bytes,
            process_group=self.process_group,
            precision=self.precision,
            return_stats=self.return_stats,
        )
