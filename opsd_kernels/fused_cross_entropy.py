"""Cross-entropy from hidden states and LM-head weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import arguments, checks
from opsd_kernels.ops.logprob import logprob
from opsd_kernels.problem import stat_dtype
from opsd_kernels.reduction import named_logprob_stats, row_scale


def fused_linear_cross_entropy(
    input: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,  # (...)
    class_weight: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy without the [tokens, vocabulary] logits. Equal to ::

        z = softcap(logit_scale * (input @ weight.T + bias)) / temperature
        torch.nn.functional.cross_entropy(
            z.float(), target, weight=class_weight, label_smoothing=label_smoothing
        )

    except that a batch whose tokens are all ignored gives 0, not NaN.

    Args:
        input, weight, bias: in float32, bfloat16, float16 or float64; each may need a gradient.
        target: integers in [0, V), or `ignore_index`.
        class_weight: w in -(1 - e) w[target] log p(target) - e / V sum_v w[v] log p(v), with e the
            label smoothing. A constant with one weight per entry of the vocabulary: `vocab_size`
            entries if that is given, those of all shards if the head is sharded. The mean divides
            by the sum of w[target].
        label_smoothing: e, in [0, 1].
        z_loss: adds z_loss * lse**2 to each token's loss, lse the log-sum-exp of z: Liger's
            `lse_square_scale`. Class weights do not apply to it; its mean is over the tokens.
        num_tokens: if given, the divisor of the mean of both parts.
        Other arguments are those of `fused_linear_jsd`.
        return_stats: also return a dict of detached tensors: logprob, entropy and lse (...);
            predicted (...), the int64 id of the largest logit, the lowest if there are several, -1
            for dropped tokens; accuracy (), the fraction of the other tokens predicted right.

    Returns:
        The loss, a scalar or (...) for reduction "none"; with return_stats (loss, statistics).
        All fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_linear_jsd`.
    """
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss}")
    problem = arguments.logprob_problem(
        input, weight, target,
        bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, vocab_size=vocab_size, with_entropy=return_stats,
        token_weight=token_weight, label_smoothing=label_smoothing, class_weight=class_weight,
        with_predicted=return_stats,
        execution=checks.execution(schedule, workspace_bytes, process_group),
    )  # fmt: skip
    like = problem.head.hidden
    checks.reduction_arguments(reduction, num_tokens, like.device)
    counted = problem.target != ignore_index
    if z_loss > 0.0:
        problem.z_weight = like.new_full((), z_loss, dtype=stat_dtype(like.dtype))
    if problem.label_weight is not None and reduction == "mean" and num_tokens is None:
        num_tokens = torch.where(counted, problem.label_weight, 0).sum()
        num_tokens = torch.where(num_tokens == 0, 1, num_tokens)
        if problem.z_weight is not None:  # the mean of the z-loss divides by the tokens instead
            problem.z_weight = problem.z_weight * num_tokens / counted.sum().clamp(min=1)
    scale = -row_scale(like, counted, problem.keep, token_weight, reduction, num_tokens)
    shape = input.shape[:-1]
    if reduction == "none":
        value, _, _, stats = logprob(problem)
        loss = (value * scale).reshape(shape)
    else:
        loss, _, _, stats = logprob(problem, scale)
    if not return_stats:
        return loss
    named = named_logprob_stats(problem.keep, stats, shape)
    keep = counted if problem.keep is None else problem.keep
    right = (named["predicted"] == target) & keep.reshape(shape)
    named["accuracy"] = right.sum() / keep.sum().clamp(min=1)
    return loss, named
