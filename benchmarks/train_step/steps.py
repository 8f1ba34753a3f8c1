"""The interface between a contender and its worker process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


@dataclass
class Step:
    """Loss and loss tokens of one optimizer step, which show that contenders do the same work."""

    loss: float = 0.0
    loss_tokens: int = 0


@dataclass(frozen=True)
class StepHooks:
    """Called before and after every step, by our loop or by a peer's trainer."""

    begin: Callable[[], None]
    end: Callable[[Step], None]


class Contender(Protocol):
    """A trainer that takes part."""

    def facts(self) -> dict[str, Any]:
        """Settings worth reporting that differ between contenders."""

    def run(self, hooks: StepHooks) -> None:
        """Take all steps, the warm-up included."""


def trainable_dtypes(model: nn.Module) -> list[str]:
    """Dtypes of the trained parameters."""
    return sorted(
        {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    )
