"""Generalized Jensen-Shannon divergence straight from hidden states and LM-head weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from opsd_kernels import checks
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
    """Divergence of two LM heads per token, without the [tokens, vocabulary] logits.

    With z = softcap(k (h @ W.T + b)) / temperature and s, t = softmax(z_s), softmax(z_t)::

        beta = 0        sum t (log t - log s)                      forward KL
        beta = 1        sum s (log s - log t)                      reverse KL
        0 < beta < 1    beta KL(t|m) + (1 - beta) KL(s|m),         m = beta t + (1 - beta) s

    Equation 7 of the OPSD paper; beta = 0 and 1 are special cases, not limits, as in TRL and
    Liger. There is no factor temperature**2. Only the student is differentiated.

    Args:
        student_input, teacher_input: hidden states, float32, bfloat16, float16 (or float64);
            hidden sizes may differ, leading shapes may not.
        student_weight, teacher_weight: heads; passing the same tensor twice computes both models'
            logits in one product.
        shift_labels: integer labels, already shifted; rows equal to `ignore_index` are dropped
            before any product. The others are only read for the statistics.
        token_weight: multiplies each token's value; a constant. Rows of weight 0 are dropped
            like ignored ones: NaN or infinity there reaches no value and no gradient.
        token_clip: each vocabulary entry contributes min(entry, token_clip); the entry of the
            JSD is beta t log(t/m) + (1 - beta) s log(s/m). Values can become negative.
        student_softcap, teacher_softcap: c of softcap(x) = c tanh(x / c).
        student_logit_scale, teacher_logit_scale: k, what a model multiplies its logits by.
        vocab_size: real vocabulary shared by two heads that are padded differently.
        reduction: "mean" divides the weighted sum by `num_tokens`, by default the number of
            tokens not ignored (all ignored gives 0); "sum"; "none".
        num_tokens: global divisor under gradient accumulation or data parallelism; a number, or
            a tensor of one element on the inputs' device or the CPU.
        schedule, workspace_bytes: see `opsd_kernels.plan`.
        process_group: the heads' rows are sharded over this group in rank order; values are those
            of the whole vocabulary and the hidden gradient is summed over the group.
        precision: how logits are kept between passes: "auto" lets the plan choose, "fp32" keeps
            them in fp32, "difference" stores them as 16-bit differences; see `opsd_kernels.plan`.
        return_stats: also return detached fp32 tensors (...), unweighted: divergence,
            student_entropy, teacher_entropy; student_logprob and teacher_logprob of the label
            where labels were given; clipped_mass (what the clip took off) where a clip was given.
            Dropped rows read 0. No further product.

    Returns:
        fp32 scalar, or (...) for "none" (fp64 for fp64 inputs); with the statistics if asked.
        Disjoint supports make a KL infinite; the gradient stays finite.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it expects.
        RuntimeError: naming what is read on the host (labels, weights, a process group) while a
            CUDA graph is captured; without them the call can be captured.
    """
    problem = checks.divergence_problem(
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

    The options are those of the function and may be read and set as attributes; `jsd_beta` is its
    `beta`. `accum_dtype` is taken for Liger's sake: sums are fp32 whatever it says.
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
