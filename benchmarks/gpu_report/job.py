"""What every process of a command is told, and the file that results are appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_device
from benchmarks.losses.cases import Shape

Row = dict[str, Any]
# Takes a row without its stage: {"id"} and one of "found" (a dict), "failed" or "absent" (why).
Emit = Callable[[Row], None]

_WORKERS = 12  # processes that compile or check at once
# What Triton's interpreter gets through in a fraction of a second: one tile of the vocabulary.
SMALL = Shape("small", 16, 40)
SMALL_TOKENS = 4


@dataclass(frozen=True)
class Job:
    """`winners` is the content of the first command's winners.json, None for its own sweeps."""

    command: str
    out: str
    small: bool
    winners: dict[str, Any] | None = None
    stage: str = ""

    @property
    def device(self) -> torch.device:
        return default_device()

    @property
    def workers(self) -> int:
        return 1 if self.small else _WORKERS

    def file(self, suffix: str) -> Path:
        return Path(self.out) / f"{self.command}.{suffix}"

    def at(self, stage: str) -> Job:
        return replace(self, stage=stage)

    def as_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Job:
        return cls(**json.loads(text))

    def append(self, row: Row) -> None:
        """One write of one line: several processes append to the same file."""
        line = json.dumps({"stage": self.stage} | row) + "\n"
        where = os.open(self.file("jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(where, line.encode())
        finally:
            os.close(where)

    def rows(self) -> list[Row]:
        """The rows of this job's stage, of all stages without one."""
        if not self.file("jsonl").exists():
            return []
        found = []
        for line in self.file("jsonl").read_text().splitlines():
            with suppress(ValueError):  # half a line: its process was killed
                found.append(json.loads(line))
        return [row for row in found if self.stage in ("", row["stage"])]


def deal(ids: Iterable[str], hands: int) -> list[list[str]]:
    """The ids in turn to so many processes; none is left without any."""
    ids = list(ids)
    return [ids[first::hands] for first in range(min(hands, len(ids)))]
