"""Draw tokens so that a completion depends on its own seed only, not on its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd_train.rollout.request import Request, Sampling


def uniforms(requests: Sequence[Request], count: int) -> Tensor:
    """(B, count) float64 in [0, 1), each row from its request's seed, the same on every device."""
    rows = [
        torch.rand(count, generator=torch.Generator().manual_seed(r.seed), dtype=torch.float64)
        for r in requests
    ]
    return torch.stack(rows)


def sampler(sampling: Sampling) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(B, V) float32 logits and (B,) uniforms in, tokens and their log-probabilities out."""
    if sampling.temperature == 0:
        return lambda logits, _: greedy(logits)
    warp = _warp(sampling)
    return lambda logits, uniform: draw(warp(None, logits), uniform)


def logprobs_of(logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """(B,) log-probabilities of `tokens` (B,) under what `sampling` makes of (B, V) logits."""
    return _logprobs(_warp(sampling)(None, logits).softmax(-1), tokens)


def _warp(sampling: Sampling) -> LogitsProcessorList:
    warp = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    return warp


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:  # (B, V) float32
    """The likeliest tokens, and their log-probabilities."""
    tokens = logits.argmax(-1)
    return tokens, _logprobs(logits.softmax(-1), tokens)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:  # (B, V) float32, (B,) float64
    """Inverse-CDF samples of softmax(logits), and their log-probabilities."""
    probabilities = logits.softmax(-1)
    cdf = probabilities.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    # Where rounding hits a token of probability 0: the end of the range, or a parallel sum.
    possible = probabilities.gather(-1, tokens[:, None])[:, 0] > 0
    tokens = torch.where(possible, tokens, probabilities.argmax(-1))
    return tokens, _logprobs(probabilities, tokens)


def _logprobs(probabilities: Tensor, tokens: Tensor) -> Tensor:
    return probabilities.gather(-1, tokens[:, None])[:, 0].log()
