"""Log-probability of a token, and the entropy around it, straight from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import checks
from opsd_kernels.ops.logprob import logprob
from opsd_kernels.problem import LOGPROB_STATS


def fused_linear_logprob(
    input: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple:
    """log p(target) per token, without the [tokens, vocabulary] logits. Equal to::

        z = softcap(logit_scale * (input @ weight.T + bias)) / temperature
        torch.log_softmax(z.float(), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    Args:
        input, weight, bias: float32, bfloat16, float16 (or float64), each may need a gradient.
        target: integers in [0, V), or `ignore_index` (value 0, no gradient).
        return_entropy: also return the entropy per token, differentiable too.
        return_lse: also return the log-sum-exp of z per token, differentiable too. With a frozen
            head, backward then multiplies the logits again: one more product.
        return_stats: also return {"lse", "entropy", "predicted"}, detached; predicted is the int64
            id of the largest logit, the lowest of equals, -1 for dropped tokens.
        Other arguments as `fused_jsd.fused_linear_jsd`.

    Returns:
        logprob (...) in fp32; then entropy (...), lse (...) and the statistics, where asked for.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it expects.
    """
    problem = checks.logprob_problem(
        input, weight, target,
        bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, vocab_size=vocab_size,
        with_entropy=return_entropy or return_stats, with_predicted=return_stats,
        execution=checks.execution(schedule, workspace_bytes, process_group),
    )  # fmt: skip
    value, entropy, lse, stats = logprob(problem, entropy_grad=return_entropy, lse_grad=return_lse)
    shape = input.shape[:-1]
    result: list[Tensor | dict[str, Tensor]] = [value.reshape(shape)]
    if return_entropy:
        result.append(entropy.reshape(shape))
    if return_lse:
        result.append(lse.reshape(shape))
    if return_stats:
        named = {n: row.reshape(shape) for n, row in zip(LOGPROB_STATS, stats, strict=True)}
        predicted = torch.where(problem.keep.reshape(shape), named["predicted"].long(), -1)
        result.append({"lse": named["lse"], "entropy": named["entropy"], "predicted": predicted})
    return result[0] if len(result) == 1 else tuple(result)
