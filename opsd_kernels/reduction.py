"""From values and statistics per token to what the caller asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_kernels.problem import LOGPROB_STATS, stat_dtype


def row_scale(
    like: Tensor,  # (N, ...), gives N, the device and the dtype
    counted: Tensor | None,  # (N,) bool, tokens the mean counts; None counts all
    keep: Tensor | None,  # (N,) bool, tokens that carry loss; None keeps all
    token_weight: Tensor | None,  # (...)
    reduction: str,
    num_tokens: float | Tensor | None,
) -> Tensor:
    """(N,) factor of each token's value in the loss; for reduction "none" the token's weight.

    It is 0 where `keep` is False, even if the weight is NaN. The mean divides by num_tokens, by
    default the number of counted tokens; a batch without any gives 0, not NaN.
    """
    scale = like.new_ones(like.shape[0], dtype=stat_dtype(like.dtype))
    if token_weight is not None:
        scale = scale * token_weight.reshape(-1).to(scale.dtype)
    if keep is not None:
        scale = torch.where(keep, scale, 0)
    if reduction != "mean":
        return scale
    if num_tokens is None:
        if counted is None:
            return scale / max(like.shape[0], 1)
        num_tokens = counted.sum().clamp(min=1)
    if isinstance(num_tokens, Tensor):
        num_tokens = num_tokens.reshape(())  # a CPU scalar may divide on any device
    return scale / num_tokens


def named_logprob_stats(
    keep: Tensor | None,  # (N,) bool, tokens that were computed; None: all
    stats: Tensor,  # (S, N)
    shape: torch.Size,  # of the tokens
) -> dict[str, Tensor]:
    """Statistics of the log-probability family by name; predicted is int64, -1 if not kept."""
    named = {n: row.reshape(shape) for n, row in zip(LOGPROB_STATS, stats, strict=True)}
    named["predicted"] = named["predicted"].long()
    if keep is not None:
        named["predicted"] = torch.where(keep.reshape(shape), named["predicted"], -1)
    return named
