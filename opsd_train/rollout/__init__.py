"""Rollout engines: prompts in, completions out, both as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opsd_train.rollout.request import Completion, Request, Sampling


class Engine(Protocol):
    """What the trainer asks of an engine."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order."""

    def sync(self) -> None:
        """Take over the weights as they are now; called before each rollout after an update."""


__all__ = ["Completion", "Engine", "Request", "Sampling"]
