"""Trainers that take hidden states to a function of TRL's: the function is replaced."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.integrations.bypass import replaced
from opsd_kernels.integrations.trl.version import check_version

_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # TRL's, beside log_probs


def use_fused_losses() -> ExitStack:
    """Let SFTTrainer, GRPOTrainer, RLOOTrainer and DistillationTrainer use the fused losses.

    Every trainer of the process that looks up TRL's chunked log-probabilities or its chunked
    divergence gets ours, until `close()` of the returned object, which may also be used as a
    context manager. A second call changes nothing.

    Raises:
        ImportError: if the installed TRL is not one of KNOWN_VERSIONS.
    """
    check_version()
    # Not before the check: another version may lack these modules.
    from trl.trainer import distillation_trainer
    from trl.trainer import utils as trl_utils

    stack = ExitStack()
    if vars(trl_utils)["_ChunkedLogProbFunction"] is FusedLogProb:
        return stack
    for module, name, value in (
        (trl_utils, "_ChunkedLogProbFunction", FusedLogProb),
        # Elsewhere than on CUDA, TRL keeps ignored tokens so that shapes stay; ours drop them.
        (trl_utils, "_use_triton", lambda device: True),
        (distillation_trainer, "_chunked_divergence_loss", divergence_loss),
    ):
        stack.enter_context(replaced(module, name, value))
    return stack


class FusedLogProb:
    """Stands for TRL's ChunkedLogProbFunction."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), (N,) each.

        Those that `outputs` does not name are None, but for log_probs. The first two are
        differentiable. `chunk_size` is not used.
        """
        if "log_sum_sq_probs" in outputs:
            raise ValueError(
                "log_sum_sq_probs (use_weighting=True of DPO) has no fused form: train without "
                "use_fused_losses()"
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # cast_lm_head_to_fp32
            bias = None if bias is None else bias.to(hidden.dtype)
        options: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        wants_entropy, wants_top1 = "entropy" in outputs, "is_top1" in outputs
        # With a trained head backward makes all gradients at once, and none that is not used.
        at_once = wants_entropy and weight.requires_grad
        result: Any = fused_linear_logprob(
            hidden, weight, targets, **options,
            return_entropy=at_once, return_stats=wants_entropy or wants_top1,
        )  # fmt: skip
        entropy, is_top1 = None, None
        if isinstance(result, Tensor):
            log_probs = result
        else:
            log_probs, *between, stats = result
            is_top1 = stats["predicted"] == targets
            if at_once:
                entropy = between[0]
            else:
                on_demand: Any = _EntropyOnDemand.apply
                call = _EntropyCall(hidden, weight, targets, options)
                entropy = on_demand(hidden, stats["entropy"], call)
        mean_logits = None
        if "mean_logits" in outputs:
            mean_logits = _mean_logits(hidden, weight, options)
        return (
            log_probs,
            entropy if wants_entropy else None,
            None,
            mean_logits,
            is_top1 if wants_top1 else None,
        )


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """Mean over the vocabulary of each token's logits, (N,): a product with the mean row."""
    if options["softcap"] is not None:
        raise ValueError(
            "mean_logits (of DPO and KTO) has no fused form for a model with a logit softcap: "
            "train without use_fused_losses()"
        )
    bias = options["bias"]
    with torch.autocast(hidden.device.type, enabled=False):
        row = weight.float().mean(0)
        mean = F.linear(hidden.float(), row[None])[:, 0] + (0 if bias is None else bias.mean())
        scaled: Tensor = mean * options["logit_scale"] / options["temperature"]
        return scaled


class _EntropyCall:
    """Arguments of the call whose entropy may need a gradient."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]
    ) -> None:
        self.tensors = (hidden.detach(), weight.detach(), targets)
        self.options = options
        device = hidden.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = (device, dtype, enabled)

    def grad_hidden(self, upstream: Tensor) -> Tensor:
        hidden, weight, targets = self.tensors
        hidden = hidden.requires_grad_()
        with torch.enable_grad(), torch.autocast(*self.autocast):
            result: Any = fused_linear_logprob(
                hidden, weight, targets, **self.options, return_entropy=True
            )
        (grad,) = torch.autograd.grad(result[1], hidden, upstream)
        return grad


class _EntropyOnDemand(torch.autograd.Function):
    """An entropy known already. Its gradient costs three products, so only a bonus pays for it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, entropy: Tensor, call: _EntropyCall) -> Tensor:
        ctx.call = call
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return ctx.call.grad_hidden(grads[0]), None, None


def divergence_loss(
    student_hidden_states: Tensor,  # (B, K, D_s)
    teacher_hidden_states: Tensor,  # (B, K, D_t)
    student_lm_head_weight: Tensor,  # (V, D_s)
    teacher_lm_head_weight: Tensor,  # (V, D_t)
    completion_mask: Tensor,  # (B, K)
    beta: float,
    num_items_in_batch: Tensor | float | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for TRL's _chunked_divergence_loss: (loss, sum of the student's entropies, tokens)."""
    keep = completion_mask != 0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(student_hidden_states.device)
    loss, stats = fused_linear_jsd(
        student_hidden_states,
        _whole(student_lm_head_weight, student_hidden_states.dtype),
        teacher_hidden_states,
        _whole(teacher_lm_head_weight, teacher_hidden_states.dtype),
        torch.where(keep, 0, -100),
        student_bias=_whole(student_lm_head_bias, student_hidden_states.dtype),
        teacher_bias=_whole(teacher_lm_head_bias, teacher_hidden_states.dtype),
        beta=beta,
        temperature=temperature,
        student_softcap=student_final_logit_softcapping,
        teacher_softcap=teacher_final_logit_softcapping,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        num_tokens=num_items_in_batch,
        return_stats=True,
    )
    return loss, stats["student_entropy"].sum(), keep.sum()


@overload
def _whole(parameter: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _whole(parameter: None, dtype: torch.dtype) -> None: ...
def _whole(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter that FSDP2 sharded, gathered, in the dtype of the hidden states."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().to(dtype)
    return parameter
