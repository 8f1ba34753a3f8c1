"""The JSON file of a loss benchmark: results and environment."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import environment


@dataclass
class Record:
    """Collects cases; `benchmarks.report` reads the file that `write` writes."""

    memory_method: str = "not measured"
    cases: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    commit: str | None = None  # for a tree without its git history
    environment: dict[str, Any] = field(default_factory=environment)

    def skip(self, case_id: str, why: str) -> None:
        """Note a case that was not measured."""
        self.skipped.append({"id": case_id, "why": why})

    def as_json(self) -> dict[str, Any]:
        """The file's content."""
        found = self.environment
        return {
            "kind": "losses",
            "environment": found | {"commit": found["commit"] or self.commit},
            "memory_method": self.memory_method,
            "seconds": round(time.time() - self.started, 1),
            "cases": self.cases,
            "skipped": self.skipped,
        }

    def write(self, path: Path) -> None:
        """Write the file and its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")
