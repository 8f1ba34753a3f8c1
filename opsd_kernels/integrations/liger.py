"""The fused linear losses of Liger-Kernel 0.8.5, by their names, on the losses of this package.

    from opsd_kernels.integrations.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss

Constructors, the order of arguments and what a call returns are Liger's; liger_kernel itself is not
needed. Four things differ:

- Logits, losses and sums are fp32 for 16-bit inputs too, whatever `accum_dtype` says.
- `compiled` and `chunk_size` are accepted and ignored: `opsd_kernels.plan` chooses the blocks.
- A batch without any counted token gives 0 everywhere, never NaN.
- Errors are ValueError or TypeError instead of AssertionError. Those found by the losses underneath
  name the arguments of `fused_linear_jsd`, `fused_linear_cross_entropy` and `fused_linear_logprob`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsd_kernels import checks
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import FusedLinearJSD as LigerFusedLinearJSD
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.integrations.liger_grpo import LigerFusedLinearGRPOLoss

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
]


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss * cross-entropy of the labels + weight_soft_loss * JSD of the teacher.

    Both are means over the labels that are not `ignore_index`. The temperature applies to the JSD
    only. The options are attributes, as in `liger_kernel.chunked_loss`.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        checks.positive("temperature", temperature)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # (N, D_s)
        student_weight: Tensor,  # (V_s, D_s)
        teacher_input: Tensor,  # (N, D_t)
        teacher_weight: Tensor,  # (V, D_t)
        true_labels: Tensor,  # (N,)
        student_bias: Tensor | None = None,  # (V_s,)
        teacher_bias: Tensor | None = None,  # (V,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss (); with `return_soft_hard_loss` (loss, soft, hard), the parts detached.

        If the teacher's head has more rows than the student's, the JSD gives the student logits of
        0 there, as Liger does. The cross-entropy never sees those rows.

        Raises:
            ValueError, TypeError, RuntimeError: as `fused_linear_jsd`.
        """
        missing = teacher_weight.shape[0] - student_weight.shape[0]
        if missing < 0:
            raise ValueError(
                f"teacher_weight: has {teacher_weight.shape[0]} vocabulary rows, student_weight "
                f"{student_weight.shape[0]}; cut student_weight to the teacher's rows, or call "
                "fused_linear_jsd with vocab_size"
            )
        soft = fused_linear_jsd(
            student_input,
            F.pad(student_weight, (0, 0, 0, missing)) if missing else student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias=F.pad(student_bias, (0, missing))
            if missing and student_bias is not None
            else student_bias,
            teacher_bias=teacher_bias,
            beta=self.beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
        )
        assert isinstance(soft, Tensor)
        loss = self.weight_soft_loss * soft
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            return loss
        hard = fused_linear_cross_entropy(
            student_input,
            student_weight,
            true_labels,
            bias=student_bias,
            ignore_index=self.ignore_index,
        )
        assert isinstance(hard, Tensor)
        loss = loss + self.weight_hard_loss * hard
        if self.return_soft_hard_loss:
            return loss, soft.detach(), hard.detach()
        return loss


@dataclass
class CrossEntropyOutput:
    """What `LigerFusedLinearCrossEntropyLoss` returns if more than the loss is asked for.

    `z_loss`, `token_accuracy` and `predicted_tokens` are detached, and None unless asked for.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """`fused_linear_cross_entropy` with the options and the call order of Liger's class.

    The loss of a token is::

        z = softcap(_input @ lin_weight.T + bias)
        cross_entropy(z, target, ce_weight, label_smoothing) + lse_square_scale * logsumexp(z)**2

    times softmax(z)[target], without its gradient, if `use_token_scaling`. The mean divides the
    first term by the sum of ce_weight[target], the second by the number of counted tokens.

    Raises:
        ValueError: an option is out of range.
        TypeError: `ce_weight` is not a floating-point tensor, `accum_dtype` not a dtype.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,  # (V,)
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= lse_square_scale < math.inf:
            raise ValueError(
                f"lse_square_scale: expected a finite number of at least 0, got {lse_square_scale}"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        if softcap is not None:
            checks.positive("softcap", softcap)
        checks.reduction_arguments(reduction, None, torch.device("cpu"))
        if ce_weight is not None:
            checks.constant("ce_weight", ce_weight)
        if not isinstance(accum_dtype, torch.dtype | None):
            raise TypeError(
                f"accum_dtype: expected a torch.dtype or None, got {type(accum_dtype).__name__}"
            )
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        bias: Tensor | None = None,  # (V,)
    ) -> Tensor | CrossEntropyOutput:
        """The loss, () or (N,) for reduction "none", alone or in a CrossEntropyOutput.

        In it `z_loss` and `token_accuracy` have the shape of the loss; the accuracy is that of the
        counted tokens. `predicted_tokens` (N,) is int64, -1 for ignored tokens.

        Raises:
            ValueError, TypeError, RuntimeError: as `fused_linear_cross_entropy`.
        """
        if self.ce_weight is not None and self.ce_weight.shape != lin_weight.shape[:1]:
            raise ValueError(
                f"ce_weight: expected shape ({lin_weight.shape[0]},), one weight per row of "
                f"lin_weight, got {tuple(self.ce_weight.shape)}"
            )
        with_parts = (
            self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens
        )
        scaling = self._target_probability(lin_weight, _input, target, bias)
        result = fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias=bias,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            token_weight=scaling,
            class_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
            reduction=self.reduction,
            return_stats=with_parts,
        )
        if isinstance(result, Tensor):
            return result
        loss, stats = result
        output = CrossEntropyOutput(loss)
        if self.return_z_loss:
            z_loss = self.lse_square_scale * stats["lse"] ** 2  # lse is 0 for ignored tokens
            output.z_loss = self._reduced(z_loss if scaling is None else z_loss * scaling, target)
        if self.return_token_accuracy:
            right = (stats["predicted"] == target) & (target != self.ignore_index)
            per_token = self.reduction == "none"
            output.token_accuracy = right.float() if per_token else stats["accuracy"]
        if self.return_predicted_tokens:
            output.predicted_tokens = stats["predicted"]
        return output

    def _target_probability(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """(N,) softmax(z)[target] for `use_token_scaling`, else None; one more product."""
        if not self.use_token_scaling:
            return None
        with torch.no_grad():
            logprob = fused_linear_logprob(
                _input,
                lin_weight,
                target,
                bias=bias,
                softcap=self.softcap,
                ignore_index=self.ignore_index,
            )
        assert isinstance(logprob, Tensor)
        # Not 0: a token of weight 0 is dropped, and its prediction with it.
        return logprob.exp().clamp(min=torch.finfo(logprob.dtype).tiny)

    def _reduced(self, value: Tensor, target: Tensor) -> Tensor:
        """`value` (N,), 0 for ignored tokens, reduced as the loss is without class weights."""
        if self.reduction == "none":
            return value
        if self.reduction == "sum":
            return value.sum()
        return value.sum() / (target != self.ignore_index).sum().clamp(min=1)
