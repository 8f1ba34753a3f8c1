"""The run folder: claim one that holds no run, and save the batch of a failed step in it."""

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
    """A run's folder, with the paths that depend on the process."""

    path: Path
    context: DistributedContext

    @property
    def scratch(self) -> Path:
        """A folder for this process's temporary files."""
        return self.path / "scratch" / f"rank_{self.context.rank}"

    def keep_batch(self, step: int, samples: Sequence[Sample]) -> Path:
        """Save a rank's samples of a step with a non-finite loss or gradient; returns the file."""
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
    """Claim `wanted` or, if it holds a run, the first of wanted-2, wanted-3, ... that does not.

    The claim is the creation of config.yaml: of two runs that start together, only one succeeds.
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
    """Undo `claim` for a run that failed to start. Other files in the folder stay."""
    (folder / "config.yaml").unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()
