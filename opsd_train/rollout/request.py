"""What goes into a rollout engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and the seed of its completion."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How a call samples; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """Generated token ids, the stop token included where one came."""

    tokens: list[int]
    logprobs: list[float]  # of each token under what it was sampled from; [] where not asked for
    finished: bool  # ended by a stop token, not by the limit
