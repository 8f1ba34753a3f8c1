"""Log-probability of one or several tokens and the entropy, from hidden states and LM head."""

from __future__ import annotations

from torch import Size, Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import arguments, checks
from opsd_kernels.ops.logprob import logprob
from opsd_kernels.ops.targets import targets_logprob
from opsd_kernels.problem import Execution
from opsd_kernels.reduction import named_logprob_stats


def fused_linear_logprob(
    input: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...) or (..., K)
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
        target: integers in [0, V), or `ignore_index` (value 0, no gradient). With shape (..., K)
            the log-probabilities of K distinct ids of each token, such as a teacher's top K, in as
            many products as of one; a token whose ids are all ignored reaches no product.
        return_entropy: also return the entropy of each token, in nats, differentiable; only with
            one target per token.
        return_lse: also return the log-sum-exp of z of each token, differentiable. With a frozen
            head and one target per token backward then computes the logits again, which is one
            more product.
        return_stats: also return a dict of detached tensors (...): lse, entropy and predicted, the
            int64 id of the largest logit, the lowest if there are several, -1 for dropped tokens.
        Other arguments are those of `fused_linear_jsd`.

    Returns:
        logprob (...) or (..., K); followed by entropy (...), lse (...) and the statistics if asked
        for. All fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_linear_jsd`; ValueError for an id that is
            given twice to a token.
    """
    execution = checks.execution(schedule, workspace_bytes, process_group)
    checks.tensor("target", target)
    checks.tensor("input", input)
    if target.ndim == input.ndim:
        if return_entropy:
            raise ValueError(
                "return_entropy: needs one target per token, got target of shape "
                f"{tuple(target.shape)}; call once more with target[..., 0]"
            )
        return _several(
            input, weight, target, bias, temperature, softcap, logit_scale, ignore_index,
            vocab_size, return_lse, return_stats, execution,
        )  # fmt: skip
    problem = arguments.logprob_problem(
        input, weight, target,
        bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, vocab_size=vocab_size,
        with_entropy=return_entropy or return_stats, with_predicted=return_stats,
        execution=execution,
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
        result.append(_stats(stats, problem.keep, shape))
    return tuple(result) if len(result) > 1 else logprob_value


def _several(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    vocab_size: int | None,
    return_lse: bool,
    return_stats: bool,
    execution: Execution,
) -> Tensor | tuple[Tensor | dict[str, Tensor], ...]:
    """`fused_linear_logprob` of K targets per token."""
    head, ids = arguments.several_targets(
        input, weight, target, bias=bias, temperature=temperature, softcap=softcap,
        logit_scale=logit_scale, vocab_size=vocab_size, execution=execution,
    )  # fmt: skip
    value, lse, stats = targets_logprob(head, ids, ignore_index, return_stats, execution)
    shape = input.shape[:-1]
    logprob_value = value.reshape(target.shape)
    result: list[Tensor | dict[str, Tensor]] = [logprob_value]
    if return_lse:
        result.append(lse.reshape(shape))
    if return_stats:
        result.append(_stats(stats, (ids != ignore_index).any(-1), shape))
    return tuple(result) if len(result) > 1 else logprob_value


def _stats(stats: Tensor, keep: Tensor | None, shape: Size) -> dict[str, Tensor]:
    """The statistics that `return_stats` promises."""
    named = named_logprob_stats(keep, stats, shape)
    return {name: named[name] for name in ("lse", "entropy", "predicted")}
