"""What a contender and the process around it say to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


@dataclass
class Step:
    """What one optimizer step worked on, so that a reader sees it was the same work."""

    loss: float = 0.0
    loss_tokens: int = 0


@dataclass(frozen=True)
class StepHooks:
    """Called around every step, by a loop of ours or by a peer's own."""

    begin: Callable[[], None]
    end: Callable[[Step], None]


class Contender(Protocol):
    def facts(self) -> dict[str, Any]:
        """Settings that a reader should know and that are not the same for all."""

    def run(self, hooks: StepHooks) -> None:
        """All steps, warm-up included."""


def trainable_dtypes(model: nn.Module) -> list[str]:
    """Types of the trained parameters: the adapters'."""
    return sorted(
        {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    )
