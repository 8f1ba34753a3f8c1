"""What goes into a rollout engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from opsd_train.config.engine_schema import EngineConfig


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and the seed of its completion."""

    prompt: list[int]
    seed: int
    teacher_prompt: list[int] | None = None
    """What the teacher of a mixture reads; None: the same."""


@dataclass(frozen=True)
class Sampling:
    """How a call samples: temperature 0 is greedy, top_p 1 and top_k 0 are all tokens."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, config: EngineConfig) -> Sampling:
        """The sampling of a recipe's section."""
        return cls(config.max_new_tokens, config.temperature, config.top_p, config.top_k)


@dataclass(frozen=True)
class Completion:
    """What an engine generated for a request."""

    tokens: list[int]
    """Token ids, the stop token included."""
    logprobs: list[float]
    """Of each token, in nats, under the distribution it was sampled from; [] if not asked for."""
    finished: bool
    """Ended by a stop token, not by max_new_tokens."""
