"""The checkpoints of a run: save one, find the newest undamaged one, load it to resume."""

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
    """Restore weights and optimizer from `training_tensors` that a checkpoint was loaded into.

    The method's tensors need no call: `training_tensors` does not copy them. Every rank calls it.
    """
    set_state_dict(
        policy.model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=TRAINED,
    )


@dataclass(frozen=True)
class Checkpoint:
    """An undamaged checkpoint on disk."""

    step: int
    path: Path
    trainer_state: dict[str, Any]
    """What `Trainer.state_dict` returned."""
    rank_states: list[dict[str, Any]]
    """State of each process that wrote it, by rank; there may have been another number."""
    single_process: bool

    def load_tensors(self, tensors: dict[str, Any]) -> None:
        """Load into `training_tensors`, in place. Every rank calls it."""
        reader = dcp.FileSystemReader(self.path / "tensors")
        dcp.load(tensors, storage_reader=reader, no_dist=self.single_process)


class Checkpoints:
    """The checkpoints of one run. Every rank makes every call."""

    def __init__(self, run_dir: Path, keep: int, context: DistributedContext) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self._keep, self._context = keep, context

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        trainer_state: dict[str, Any],
        rank_state: dict[str, Any],
        recipe: str,
        write_adapter: Callable[[Path], None] | None = None,
        best: int | None = None,
    ) -> Path:
        """Write a whole checkpoint or nothing, then keep the last `keep` and that of step `best`,
        and remove older ones.

        tensors        of `training_tensors`
        trainer_state  JSON; rank 0's is written
        rank_state     of each rank: what torch.load reads with weights_only=True
        recipe         the resolved recipe, YAML
        write_adapter  writes the adapter into the folder it is given; every rank calls it

        Returns the checkpoint's folder. Raises UserError on every rank if a rank cannot write.
        """
        target = self.folder / f"step_{step:06d}"
        writer = CheckpointWriter(target, tensors, self._context)
        writer.write(trainer_state, rank_state, recipe, write_adapter)
        writer.on_all_ranks(functools.partial(self._remove_others, step, best))
        return target

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, the same on every rank."""
        found = [_step(folder) for folder in self._folders()] if self._context.is_main else None
        return self._context.broadcast(found)

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files are as they were written; None if there is none.

        A damaged one is skipped with a line on stderr. Raises UserError if all are damaged.
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

    def of_the_run(self) -> Path | None:
        """The checkpoint with the weights that the run ended with: the newest whole one, or the
        best where collapse.action=best went back to it. Raises UserError as `newest_whole`."""
        newest, summary = self.newest_whole(), self.folder.parent / "summary.json"
        if newest is None or not summary.exists():
            return newest
        ended = json.loads(summary.read_text(encoding="utf-8"))
        best = ended.get("weights_of_step")
        if best is None or ended["steps"] != _step(newest):  # or it was resumed since
            return newest
        return self._undamaged(best)

    def newest(self, recipe: str) -> Checkpoint | None:
        """The newest undamaged checkpoint; None if there is none.

        Raises UserError if it was not written by this version, or if training with `recipe` would
        not continue its training.
        """
        folder = self.newest_whole()
        if folder is None:
            return None
        state = folder / "trainer_state.json"
        if not state.exists():
            raise UserError(
                f"{folder} has no trainer_state.json: it is of version 0.1, which this version "
                "cannot resume; start a new run with another output_dir"
            )
        refuse_changes((folder / "recipe.yaml").read_text(encoding="utf-8"), recipe, folder)
        return self._read(folder)

    def whole(self, step: int) -> Checkpoint:
        """The checkpoint of this step, which this run has written. Raises UserError if it is
        damaged."""
        return self._read(self._undamaged(step))

    def _undamaged(self, step: int) -> Path:
        folder = self.folder / f"step_{step:06d}"
        if damage := self._damage(folder):
            raise UserError(f"checkpoint {folder} is damaged ({damage})")
        return folder

    def _read(self, folder: Path) -> Checkpoint:
        state = folder / "trainer_state.json"
        ranks = len(list(folder.glob("rank_*.pt")))
        if ranks != self._context.size:
            self._say(
                f"checkpoint {folder} is of {ranks} processes and continues on "
                f"{self._context.size}: losses will differ a little from those of one run"
            )
        return Checkpoint(
            step=_step(folder),
            path=folder,
            trainer_state=json.loads(state.read_text(encoding="utf-8")),
            rank_states=[
                torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(ranks)
            ],
            single_process=self._context.size == 1,
        )

    def _folders(self) -> list[Path]:
        """All checkpoints, damaged ones too, oldest first."""
        found = self.folder.glob("step_*")
        return sorted((f for f in found if f.name.removeprefix("step_").isdigit()), key=_step)

    def _remove_others(self, step: int, best: int | None) -> None:
        """Keep the last `keep` checkpoints up to this step and the best; later ones are damaged."""
        if not self._context.is_main:
            return
        folders = self._folders()
        kept = [folder for folder in folders if _step(folder) <= step][-self._keep :]
        kept += [folder for folder in folders if _step(folder) == best]
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(folder)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint's files, or None; the same answer on every rank."""
        own_sums = {
            path.relative_to(folder).as_posix(): checksum(path)
            for path in own_files(folder, self._context)
        }
        found = merged(self._context.all_gather(own_sums))
        found.pop("complete.json", None)
        try:
            written = dict(json.loads((folder / "complete.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return "complete.json cannot be read"
        for name in sorted(written.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if found[name] != written.get(name):
                return f"{name} is not what was written"
        return None

    def _say(self, line: str) -> None:
        if self._context.is_main:
            print(line, file=sys.stderr)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
