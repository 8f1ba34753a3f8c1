"""Checkpoints that survive a kill at any moment, a full disk and damaged files.

checkpoints/step_000010/
  tensors/        trained weights, optimizer, the method's tensors (torch.distributed.checkpoint)
  rank_0.pt …     what belongs to one process: its random streams
  adapter/        the adapter in PEFT's format, where adapters are trained
  facts.json      everything else
  recipe.yaml     the resolved recipe
  complete.json   size and checksum of every other file

A checkpoint is written as step_000010.tmp, brought to disk, and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from opsd_train.config.changes import refuse_changes
from opsd_train.config.errors import UserError
from opsd_train.distributed.context import World
from opsd_train.model.policy import Policy

# DCP says so even where it was told that the process is alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def training_tensors(
    policy: Policy, optimizer: torch.optim.Optimizer, method_state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Trained weights, optimizer state and the method's tensors; not copies. Every rank calls it.

    There must be no gradients.
    """
    fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(policy.model, optimizer, options=_TRAINED)
    if fresh:  # the call above made a state, by a step of zeros that must not count
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"model": model_state, "optimizer": optimizer_state, "method": dict(method_state)}


def restore_training(
    policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Any]
) -> None:
    """Hand filled `training_tensors` back; the method's are in place already."""
    set_state_dict(
        policy.model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=_TRAINED,
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

    def __init__(self, run_dir: Path, keep: int, world: World) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self._keep, self._world = keep, world

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
        world, target = self._world, self.folder / f"step_{step:06d}"
        partial = target.with_suffix(".tmp")
        needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tensors))

        def start() -> None:
            if world.leads:
                for leftover in self.folder.glob("*.tmp"):  # of killed runs
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)

        def write() -> None:
            writer = dcp.FileSystemWriter(partial / "tensors")
            dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)

        def write_rest() -> None:
            if write_adapter is not None:
                write_adapter(partial / "adapter")
            torch.save(rank_facts, partial / f"rank_{world.rank}.pt")
            if world.leads:
                (partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
                (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

        def flush() -> dict[str, list[Any]]:
            paths = self._share(partial)
            for path in (*paths, *(folder for folder in partial.rglob("*") if folder.is_dir())):
                _flush(path)
            return {path.relative_to(partial).as_posix(): _checksum(path) for path in paths}

        def publish() -> None:
            if not world.leads:
                return
            with open(partial / "complete.json", "w", encoding="utf-8") as file:
                json.dump(_merged(sums), file, indent=1)
            _flush(partial / "complete.json")
            _flush(partial)
            if target.exists():  # damaged: else the run would have gone on from it
                shutil.rmtree(target)
            partial.rename(target)
            _flush(self.folder)
            self._remove_others(step)

        for work in (start, write, write_rest):
            self._together(work, partial, needed)
        sums = self._together(flush, partial, needed)
        self._together(publish, partial, needed)
        return target

    def newest_whole(self) -> Path | None:
        """The last checkpoint whose files are as they were written, None if there is none at all.

        Damaged ones are passed over with a line on stderr.
        """
        folders = self._world.broadcast(self._folders() if self._world.leads else None)
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
        same = ranks == self._world.size
        if not same:
            self._say(
                f"checkpoint {folder} is of {ranks} processes and continues on "
                f"{self._world.size}: losses will differ a little from those of one run"
            )
        own = folder / f"rank_{self._world.rank}.pt"
        return Loaded(
            step=_step(folder),
            path=folder,
            facts=json.loads((folder / "facts.json").read_text(encoding="utf-8")),
            rank_facts=torch.load(own, weights_only=True) if same else None,
            alone=self._world.size == 1,
        )

    def _folders(self) -> list[Path]:
        """Checkpoints, whole or damaged, oldest first."""
        found = self.folder.glob("step_*")
        return sorted((f for f in found if f.name.removeprefix("step_").isdigit()), key=_step)

    def _remove_others(self, step: int) -> None:
        """Keep this one and those before it; what is later is damaged and was passed over."""
        folders = self._folders()
        kept = [folder for folder in folders if _step(folder) <= step][-self._keep :]
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(folder)

    def _share(self, folder: Path) -> list[Path]:
        """This rank's part of the files of a checkpoint."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return paths[self._world.rank :: self._world.size]

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint's files; the same answer on every rank."""
        own = {path.relative_to(folder).as_posix(): _checksum(path) for path in self._share(folder)}
        found = _merged(self._world.all_gather(own))
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

    def _together(self, work: Callable[[], Any], partial: Path, needed: int) -> list[Any]:
        """Every rank's result; if one fails, all raise and nothing of the checkpoint stays."""
        result = error = reason = None
        try:
            result = work()
        except (Exception, CheckpointException) as caught:  # the latter is a BaseException
            error, reason = caught, _disk_trouble(caught, partial, needed)
        answers = self._world.all_gather((result, error and (reason or repr(error))))
        failures = [failure for _, failure in answers if failure]
        if not failures:
            return [result for result, _ in answers]
        if self._world.leads:
            shutil.rmtree(partial, ignore_errors=True)
        if error is not None and reason is None:
            raise error
        raise UserError(
            f"cannot write the checkpoint {partial.with_suffix('')}: {failures[0]}; it needs about "
            f"{needed / 2**20:.1f} MiB. Older checkpoints are kept: make room and --resume"
        ) from error

    def _say(self, line: str) -> None:
        if self._world.leads:
            print(line, file=sys.stderr)


def _disk_trouble(error: BaseException, folder: Path, needed: int) -> str | None:
    """The reason for people if a disk is to blame, None if the program is."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return os.strerror(cause.errno) if cause.errno else str(cause)
    # torch's and safetensors' own writers do not say why they fail.
    there = next(parent for parent in folder.parents if parent.exists())
    full = shutil.disk_usage(there).free < needed
    return os.strerror(errno.ENOSPC) if full else None


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from _tensors(value)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
