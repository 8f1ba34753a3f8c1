"""Log-probability of a token and the entropy, from hidden states and LM-head weight."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import arguments, checks
from opsd_kernels.ops.logprob import logprob
from opsd_kernels.reduction import named_logprob_stats


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
) -> Tensor | tuple[Tensor | dict[str, Tensor], ...]:
    """log p(target) of each token, without the [tokens, vocabulary] logits. Equal to ::

        z = softcap(logit_scale * (input @ weight.T + bias)) / temperature
        torch.log_softmax(z.float(), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    Args:
        input, weight, bias: in float32, bfloat16, float16 or float64; each may need a gradient.
        target: integers in [0, V), or `ignore_index` (value 0, no gradient).
        return_entropy: also return the entropy of each token, in nats, differentiable.
        return_lse: also return the log-sum-exp of z of each token, differentiable. With a frozen
            head backward then computes the logits again, which is one more product.
        return_stats: also return a dict of detached tensors (...): lse, entropy and predicted, the
            int64 id of the largest logit, the lowest if there are several, -1 for dropped tokens.
        Other arguments are those of `fused_linear_jsd`.

    Returns:
        logprob (...); followed by entropy (...), lse (...) and the statistics if asked for. All
        fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_linear_jsd`.
    """
    problem = arguments.logprob_problem(
        input, weight, target,
        bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, vocab_size=vocab_size,
        with_entropy=return_entropy or return_stats, with_predicted=return_stats,
        execution=checks.execution(schedule, workspace_bytes, process_group),
    )  # fmt: skip
    value, entropy, lse, stats = logprob(problem, entropy_grad=return_entropy, lse_grad=return_lse)
    shape = input.shape[:-1]
    logprob_value = value.reshape(shape)
    result: list[Tensor | dict[str, Tensor]] = [logprob_value]
    if return_entropy:
        result.append(entropy.reshape(shape))
    if return_lse:
        result.append(lse.reshape(shape))
    if return_stats:
        named = named_logprob_stats(problem, stats, shape)
        result.append({name: named[name] for name in ("lse", "entropy", "predicted")})
    return tuple(result) if len(result) > 1 else logprob_value
