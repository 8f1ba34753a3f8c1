"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from opsd_train.config.errors import UserError


@dataclass(frozen=True)
class DistributedContext:
    """This process's place among all; without torchrun it is alone, and every call is local."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce(value, dist.ReduceOp.MAX)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on rank 0; nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.all_gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """At a normal end: NCCL complains about processes that just go."""
        if self.size > 1:
            dist.destroy_process_group()

    def _reduce(self, value: float, operation: Any) -> float:
        if self.size == 1:
            return value
        # fp64 keeps token counts exact; NCCL wants it on its device.
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, operation)
        return total.item()


def start(device: str) -> DistributedContext:
    """Join the other processes where torchrun started some; `device` as in the recipe."""
    local, rank = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    found = resolve_device(device, local)
    if size == 1:
        return DistributedContext(found)
    if not dist.is_initialized():
        if found.type == "cuda":
            torch.cuda.set_device(found)
        dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    return DistributedContext(found, rank, size)


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process; "auto" takes a GPU where there is one, "cuda" its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        there = device.type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        there = False
    if not there:
        hint = "; start no more processes than there are GPUs" if local_rank else ""
        raise UserError(f"model.device={name} is not there; PyTorch has {_devices()}{hint}")
    return device


def _devices() -> str:
    """The devices of this machine that PyTorch can use, in words."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return "only cpu here"
    return f"cpu and {torch.accelerator.device_count()} x {accelerator.type} here"
