"""The run folder: which one, and what is kept there when a step fails."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from opsd_train.data.batches import Sample
from opsd_train.distributed.context import DistributedContext


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, as one of its processes sees it."""

    path: Path
    context: DistributedContext

    @property
    def scratch(self) -> Path:
        """A folder of this process for files that need not outlive it."""
        return self.path / "scratch" / f"rank_{self.context.rank}"

    def keep_batch(self, step: int, samples: Sequence[Sample]) -> Path:
        """Save the samples of a step whose loss or gradient is not finite."""
        rank = f"_rank_{self.context.rank}" if self.context.size > 1 else ""
        path = self.path / f"nonfinite_step_{step}{rank}.pt"
        rows = [
            {
                "problem": sample.problem.id,
                "student_prompt": sample.student_prompt,
                "teacher_prompt": sample.teacher_prompt,
                "completion": sample.completion,
                "weight": sample.weight,
                "advantage": sample.advantage,
            }
            for sample in samples
        ]
        torch.save(rows, path)
        return path


def claim(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that holds no run, now taken.

    Creating config.yaml takes it: of two runs that start together only one can.
    """
    folder, count = wanted, 1
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "config.yaml").touch(exist_ok=False)
            return folder
        except FileExistsError:
            count += 1
            folder = wanted.with_name(f"{wanted.name}-{count}")


def release(folder: Path) -> None:
    """Give back a folder whose run failed before its first step; what else is in it stays."""
    (folder / "config.yaml").unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()
