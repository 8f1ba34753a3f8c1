"""Rollout engines: prompts in, completions out, both as token ids."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.sections import RolloutConfig


class Engine(Protocol):
    """What the trainer asks of an engine."""

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        batch_size: int,
        seed: int | None,
    ) -> list[list[int]]:
        """One completion per prompt, its end token included; greedy where seed is None."""


def make_engine(config: RolloutConfig, model: nn.Module, tokenizer: Any) -> Engine:
    """The engine that the recipe names."""
    return TransformersEngine(model, tokenizer, config)
