"""Samples tokens. A completion depends on its own seed, and not on its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

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
    """(B, count) float64 on the CPU, uniform in [0, 1): each row from its request's seed alone."""
    rows = [
        torch.rand(count, generator=torch.Generator().manual_seed(r.seed), dtype=torch.float64)
        for r in requests
    ]
    return torch.stack(rows)


def sampler(sampling: Sampling) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function from (B, V) float32 logits and (B,) uniforms to (B,) tokens and log-probabilities.

    At temperature 0 it does not use the uniforms.
    """
    if sampling.temperature == 0:
        return lambda logits, _: greedy(logits)
    warp = _warp(sampling)
    return lambda logits, uniform: draw(warp(logits), uniform)


def logprobs_of(logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """(B,) log-probabilities of (B,) `tokens` from (B, V) logits; temperature 0 has none.

    They are those of the distribution that is sampled: after temperature, top-k and top-p.
    """
    return _logprobs(_warp(sampling)(logits).softmax(-1), tokens)


def _warp(sampling: Sampling) -> Callable[[Tensor], Tensor]:
    """Temperature, top-k and top-p, as transformers applies them to (B, V) logits."""
    warp = LogitsProcessorList()
    if sampling.temperature != 1:
        warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    return partial(warp, cast(Any, None))  # none of them reads the input ids


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) likeliest tokens of (B, V) float32 logits, and their (B,) log-probabilities."""
    tokens = logits.argmax(-1)
    return tokens, _logprobs(logits.softmax(-1), tokens)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) tokens drawn from softmax(logits) by the inverse CDF, and their log-probabilities.

    `logits`: (B, V) float32; `uniform`: (B,) float64 in [0, 1).
    """
    probabilities = logits.softmax(-1)
    cdf = probabilities.double().cumsum_(-1)  # in place: a third (B, V) tensor is slow to map
    target = uniform[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    # Rounding may hit a token of probability 0: at the end of the range, or in a parallel sum.
    possible = probabilities.gather(-1, tokens[:, None])[:, 0] > 0
    if not possible.all():
        tokens = torch.where(possible, tokens, probabilities.argmax(-1))
    return tokens, _logprobs(probabilities, tokens)


def _logprobs(probabilities: Tensor, tokens: Tensor) -> Tensor:
    return probabilities.gather(-1, tokens[:, None])[:, 0].log()
