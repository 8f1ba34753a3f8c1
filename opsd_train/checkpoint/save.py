"""Write checkpoints so that a kill, a full disk or a damaged file never costs the older ones.

checkpoints/step_000010/
  tensors/            trained weights, optimizer, the method's tensors (PyTorch's DCP format)
  rank_0.pt ...       state of one process: its random number generators, and with rollout.ahead
                      its samples of the next step
  adapter/            the adapter in PEFT's format, if adapters are trained
  trainer_state.json  the rest of the trainer's state
  recipe.yaml         the resolved recipe
  complete.json       size and SHA-256 of every other file

A checkpoint is written as step_000010.tmp, flushed to disk, and renamed.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from opsd_train.config.errors import UserError
from opsd_train.distributed.context import DistributedContext
from opsd_train.model.policy import Policy

# DCP warns even when it is told that there is one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def training_tensors(
    policy: Policy, optimizer: torch.optim.Optimizer, method_state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Trained weights, optimizer state and the method's tensors, by reference: nothing is copied.

    Every rank calls it, at a moment when no parameter has a gradient.
    """
    was_empty = not optimizer.state
    model_state, optimizer_state = get_state_dict(policy.model, optimizer, options=TRAINED)
    if was_empty:  # get_state_dict created the state by a step with zero gradients: do not count it
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"model": model_state, "optimizer": optimizer_state, "method": dict(method_state)}


class CheckpointWriter:
    """Writes one checkpoint, whole or not at all. Every rank makes every call."""

    def __init__(self, target: Path, tensors: dict[str, Any], context: DistributedContext) -> None:
        self._target, self._partial = target, target.with_suffix(".tmp")
        self._tensors, self._context = tensors, context
        self._size = sum(tensor.numel() * tensor.element_size() for tensor in _leaves(tensors))

    def write(
        self,
        trainer_state: dict[str, Any],
        rank_state: dict[str, Any],
        recipe: str,
        write_adapter: Callable[[Path], None] | None,
    ) -> None:
        """Write the checkpoint and rename it into place; see Checkpoints.save."""
        self.on_all_ranks(self._begin)
        self.on_all_ranks(self._write_tensors)
        self.on_all_ranks(
            functools.partial(self._write_rest, trainer_state, rank_state, recipe, write_adapter)
        )
        sums = self.on_all_ranks(self._flush_files)
        self.on_all_ranks(functools.partial(self._publish, merged(sums)))

    def on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Call `work` on every rank and return all results, in rank order.

        If it fails on any rank, rank 0 removes the partial checkpoint and all ranks raise: a rank
        whose error no disk is to blame for raises that error, the others raise UserError.
        """
        result = error = reason = None
        try:
            result = work()
        except (Exception, CheckpointException) as caught:  # the latter is a BaseException
            error, reason = caught, _disk_trouble(caught, self._partial, self._size)
        answers = self._context.all_gather((result, error and (reason or repr(error))))
        failures = [failure for _, failure in answers if failure]
        if not failures:
            return [result for result, _ in answers]
        if self._context.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        if error is not None and reason is None:
            raise error
        raise UserError(
            f"cannot write the checkpoint {self._target}: {failures[0]}; it needs about "
            f"{self._size / 2**20:.1f} MiB. Older checkpoints are kept: make room and --resume"
        ) from error

    def _begin(self) -> None:
        if self._context.is_main:
            for leftover in self._target.parent.glob("*.tmp"):  # of killed runs
                shutil.rmtree(leftover)
            self._partial.mkdir(parents=True)

    def _write_tensors(self) -> None:
        writer = dcp.FileSystemWriter(self._partial / "tensors")
        dcp.save(self._tensors, storage_writer=writer, no_dist=self._context.size == 1)

    def _write_rest(
        self,
        trainer_state: dict[str, Any],
        rank_state: dict[str, Any],
        recipe: str,
        write_adapter: Callable[[Path], None] | None,
    ) -> None:
        if write_adapter is not None:
            write_adapter(self._partial / "adapter")
        torch.save(rank_state, self._partial / f"rank_{self._context.rank}.pt")
        if self._context.is_main:
            (self._partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
            state_file = self._partial / "trainer_state.json"
            state_file.write_text(json.dumps(trainer_state), encoding="utf-8")

    def _flush_files(self) -> dict[str, list[Any]]:
        """Flush this rank's share of the files; returns their checksums by name."""
        paths = own_files(self._partial, self._context)
        for path in (*paths, *(path for path in self._partial.rglob("*") if path.is_dir())):
            _flush(path)
        return {path.relative_to(self._partial).as_posix(): checksum(path) for path in paths}

    def _publish(self, sums: dict[str, list[Any]]) -> None:
        """Write complete.json and give the checkpoint its final name."""
        if not self._context.is_main:
            return
        with open(self._partial / "complete.json", "w", encoding="utf-8") as file:
            json.dump(sums, file, indent=1)
        _flush(self._partial / "complete.json")
        _flush(self._partial)
        if self._target.exists():  # damaged, or the run would have resumed from it
            shutil.rmtree(self._target)
        self._partial.rename(self._target)
        _flush(self._target.parent)


def own_files(folder: Path, context: DistributedContext) -> list[Path]:
    """This rank's share of a checkpoint's files, to checksum; every size-th of the sorted ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return paths[context.rank :: context.size]


def _disk_trouble(error: BaseException, folder: Path, needed: int) -> str | None:
    """The reason to show if a disk is to blame for the error; None if the program is."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return os.strerror(cause.errno) if cause.errno else str(cause)
    # The writers of torch and safetensors do not say why they fail.
    there = next(parent for parent in folder.parents if parent.exists())
    full = shutil.disk_usage(there).free < needed
    return os.strerror(errno.ENOSPC) if full else None


def _flush(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> list[Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The parts as one mapping."""
    return {name: value for part in parts for name, value in part.items()}


def _leaves(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from _leaves(value)
