"""The checkpoints of a run: which there are, which are whole, and what a resumed run takes over."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import set_state_dict

from opsd_train.checkpoint.save import TRAINED, CheckpointWriter, checksum, merged, own_files
from opsd_train.config.changes import refuse_changes
from opsd_train.config.errors import UserError
from opsd_train.distributed.context import DistributedContext
from opsd_train.model.policy import Policy


def restore_training(
    policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Any]
) -> None:
    """Hand filled `training_tensors` back; the method's are in place already."""
    set_state_dict(
        policy.model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=TRAINED,
    )


@dataclass(frozen=True)
class Loaded:
    """A checkpoint found whole."""

    step: int
    path: Path
    facts: dict[str, Any]
    rank_facts: dict[str, Any] | None
    """This rank's; None where the checkpoint was written by another number of processes."""
    alone: bool

    def fill(self, tensors: dict[str, Any]) -> None:
        """Load into these tensors, in place; every rank calls it."""
        reader = dcp.FileSystemReader(self.path / "tensors")
        dcp.load(tensors, storage_reader=reader, no_dist=self.alone)


class Checkpoints:
    """The checkpoints of one run. Every rank makes every call."""

    def __init__(self, run_dir: Path, keep: int, context: DistributedContext) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self._keep, self._context = keep, context

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        facts: dict[str, Any],
        rank_facts: dict[str, Any],
        recipe: str,
        write_adapter: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write all of it or nothing, then remove older checkpoints than the last `keep`.

        `facts` are JSON (rank 0's count); `rank_facts` are what torch.load takes with weights_only.
        """
        target = self.folder / f"step_{step:06d}"
        writer = CheckpointWriter(target, tensors, self._context)
        writer.write(facts, rank_facts, recipe, write_adapter)
        writer.together(functools.partial(self._remove_others, step))
        return target

    def newest_whole(self) -> Path | None:
        """The last checkpoint whose files are as they were written, None if there is none at all.

        Damaged ones are passed over with a line on stderr.
        """
        folders = self._context.broadcast(self._folders() if self._context.is_main else None)
        for folder in reversed(folders):
            damage = self._damage(folder)
            if damage is None:
                return folder
            self._say(f"checkpoint {folder} is damaged ({damage}); trying the one before it")
        if folders:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged; start again with another output_dir"
            )
        return None

    def newest(self, recipe: str) -> Loaded | None:
        """That checkpoint, loaded; a recipe that would not continue its training is refused."""
        folder = self.newest_whole()
        if folder is None:
            return None
        refuse_changes((folder / "recipe.yaml").read_text(encoding="utf-8"), recipe, folder)
        ranks = len(list(folder.glob("rank_*.pt")))
        same = ranks == self._context.size
        if not same:
            self._say(
                f"checkpoint {folder} is of {ranks} processes and continues on "
                f"{self._context.size}: losses will differ a little from those of one run"
            )
        own = folder / f"rank_{self._context.rank}.pt"
        return Loaded(
            step=_step(folder),
            path=folder,
            facts=json.loads((folder / "facts.json").read_text(encoding="utf-8")),
            rank_facts=torch.load(own, weights_only=True) if same else None,
            alone=self._context.size == 1,
        )

    def _folders(self) -> list[Path]:
        """Checkpoints, whole or damaged, oldest first."""
        found = self.folder.glob("step_*")
        return sorted((f for f in found if f.name.removeprefix("step_").isdigit()), key=_step)

    def _remove_others(self, step: int) -> None:
        """Keep this one and those before it; what is later is damaged and was passed over."""
        if not self._context.is_main:
            return
        folders = self._folders()
        kept = [folder for folder in folders if _step(folder) <= step][-self._keep :]
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(folder)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint's files; the same answer on every rank."""
        own = {
            path.relative_to(folder).as_posix(): checksum(path)
            for path in own_files(folder, self._context)
        }
        found = merged(self._context.all_gather(own))
        found.pop("complete.json", None)
        try:
            wanted = dict(json.loads((folder / "complete.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return "complete.json cannot be read"
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if found[name] != wanted.get(name):
                return f"{name} is not what was written"
        return None

    def _say(self, line: str) -> None:
        if self._context.is_main:
            print(line, file=sys.stderr)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
