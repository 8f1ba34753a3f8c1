"""The settings of a command that every process gets, and the file that results go to."""

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
# Records a row: {"id"} and one of "found" (a dict), "failed" or "absent" (the reason); no stage.
Emit = Callable[[Row], None]

_WORKERS = 12  # processes that compile or check at once
# Takes Triton's interpreter a fraction of a second: three tiles, and more entries than TOP_K.
SMALL = Shape("small", 16, 130)
SMALL_TOKENS = 4


@dataclass(frozen=True)
class GpuJob:
    """Settings of a command; processes get them as JSON.

    `winners` is the first command's winners.json, if one was given. `stage` is the stage whose rows
    `append` and `rows` are about; "" means all.
    """

    command: str
    out: str
    small: bool
    winners: dict[str, Any] | None = None
    stage: str = ""

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU if there is none."""
        return default_device()

    @property
    def workers(self) -> int:
        """How many processes compile or check at the same time."""
        return 1 if self.small else _WORKERS

    def file(self, suffix: str) -> Path:
        """COMMAND.suffix in the output folder."""
        return Path(self.out) / f"{self.command}.{suffix}"

    def at(self, stage: str) -> GpuJob:
        """The same settings for one stage."""
        return replace(self, stage=stage)

    def as_text(self) -> str:
        """As JSON, for a process's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> GpuJob:
        """The inverse of `as_text`."""
        return cls(**json.loads(text))

    def append(self, row: Row) -> None:
        """Append a row to COMMAND.jsonl, in one write: several processes append to the file."""
        line = json.dumps({"stage": self.stage} | row) + "\n"
        where = os.open(self.file("jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(where, line.encode())
        finally:
            os.close(where)

    def rows(self) -> list[Row]:
        """The recorded rows of the stage, or of all stages."""
        if not self.file("jsonl").exists():
            return []
        found = []
        for line in self.file("jsonl").read_text().splitlines():
            with suppress(ValueError):  # an incomplete line of a process that was killed
                found.append(json.loads(line))
        return [row for row in found if self.stage in ("", row["stage"])]


def deal(ids: Iterable[str], hands: int) -> list[list[str]]:
    """Deal the ids to at most `hands` processes in turn; no process gets none."""
    ids = list(ids)
    return [ids[first::hands] for first in range(min(hands, len(ids)))]
