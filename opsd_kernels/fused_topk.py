"""The most likely tokens of each position, from hidden states and LM-head weight."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from opsd_kernels import arguments, checks
from opsd_kernels.ops.topk import topk


def fused_linear_topk(
    input: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    k: int,
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    shift_labels: Tensor | None = None,  # (...)
    ignore_index: int = -100,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest log-probabilities of each token, without the [tokens, vocabulary] logits.

    Equal to this, with the lower id first where logits are equal::

        z = softcap(logit_scale * (input @ weight.T + bias)) / temperature
        logprob, ids = torch.log_softmax(z.float(), -1).topk(k)
        lse = z.float().logsumexp(-1)

    It is never differentiated; inputs that need a gradient are detached. With
    `fused_linear_logprob` for the student it makes the two sides of `topk_divergence`.

    Args:
        input, weight, bias: in float32, bfloat16, float16 or float64. Without a softcap a bias of
            -inf bans an entry: its log-probability is -inf, and its id comes last, the lower first.
        k: 1 to V. With `process_group` it may exceed the rows of a shard.
        shift_labels: tokens equal to `ignore_index` are dropped before any product. The other
            labels are not used.
        schedule: "auto", "blocked" or, on a GPU, "tiled". "streaming" stores no logits to choose
            from, and is refused.
        Other arguments are those of `fused_linear_jsd`.

    Returns:
        logprob (..., k), largest first; ids (..., k) int64; lse (...), the log-sum-exp of z. Floats
        are fp32, or fp64 for fp64 inputs. A dropped token has log-probabilities and lse of 0, and
        its ids are `ignore_index`.

    Raises:
        ValueError: k is no integer from 1 to V.
        ValueError, TypeError, RuntimeError: as `fused_linear_jsd`.
    """
    problem = arguments.topk_problem(
        input, weight, k, shift_labels,
        bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, vocab_size=vocab_size,
        execution=checks.execution(schedule, workspace_bytes, process_group),
    )  # fmt: skip
    logprob, ids, lse = topk(problem)
    shape = input.shape[:-1]
    return logprob.reshape(*shape, k), ids.reshape(*shape, k), lse.reshape(shape)
