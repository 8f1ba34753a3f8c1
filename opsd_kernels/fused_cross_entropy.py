"""Cross-entropy straight from hidden states and LM-head weight."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import checks
from opsd_kernels.ops.logprob import logprob
from opsd_kernels.problem import LOGPROB_STATS
from opsd_kernels.reduction import row_scale


def fused_linear_cross_entropy(
    input: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,  # (...)
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy without the [tokens, vocabulary] logits. Equal to::

        z = softcap(input @ weight.T + bias) / temperature
        torch.nn.functional.cross_entropy(z.float(), target, label_smoothing=label_smoothing)

    except that a batch whose tokens are all ignored gives 0 rather than NaN.

    Args:
        input, weight, bias: float32, bfloat16, float16 (or float64), each may need a gradient.
        target: integers in [0, V), or `ignore_index`.
        label_smoothing: e in (1 - e) log p(target) + e mean_v log p(v).
        token_weight, reduction, num_tokens and the rest: as `fused_jsd.fused_linear_jsd`.
        return_stats: also return {"logprob", "entropy", "lse"}, detached (...).

    Returns:
        fp32 scalar, or (...) for reduction "none"; with the statistics if asked.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it expects.
    """
    problem = checks.logprob_problem(
        input, weight, target,
        bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        vocab_size=vocab_size, with_entropy=return_stats, token_weight=token_weight,
        label_smoothing=label_smoothing,
        execution=checks.execution(schedule, workspace_bytes, process_group),
    )  # fmt: skip
    checks.reduction_arguments(reduction, num_tokens, problem.head.hidden.device)
    counted = problem.target != ignore_index
    scale = -row_scale(
        problem.head.hidden, counted, problem.keep, token_weight, reduction, num_tokens
    )
    shape = input.shape[:-1]
    if reduction == "none":
        value, _, stats = logprob(problem)
        loss = (value * scale).reshape(shape)
    else:
        loss, _, stats = logprob(problem, scale)
    if not return_stats:
        return loss
    return loss, {n: row.reshape(shape) for n, row in zip(LOGPROB_STATS, stats, strict=True)}
