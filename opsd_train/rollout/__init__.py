"""Rollout engines: prompts in, completions out, both as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opsd_train.rollout.request import Completion, Request, Sampling


class Engine(Protocol):
    """What training and evaluation need of an engine."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order."""

    def sync(self) -> None:
        """Use the weights as they are now. Every rank calls it before each rollout."""


__all__ = ["Completion", "Engine", "Request", "Sampling"]
