"""The processes of a run: a single one, or those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from opsd_train.config.errors import UserError


@dataclass(frozen=True)
class DistributedContext:
    """This process's device, rank and world size, with the collectives the trainer uses.

    With one process each collective returns its argument and needs no process group. With several,
    every rank must make the same calls in the same order.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes the run folder."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks, in fp64."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """The largest `value` of all ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        return self.all_gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def shutdown(self) -> None:
        """Destroy the process group at a normal end; NCCL warns about processes that just exit."""
        if self.size > 1:
            dist.destroy_process_group()

    def _reduce(self, value: float, operation: Any) -> float:
        if self.size == 1:
            return value
        # fp64 keeps token counts exact; NCCL reduces tensors on its own device only.
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, operation)
        return total.item()


def init_distributed(device: str) -> DistributedContext:
    """Read torchrun's environment variables and join its process group, if there is one.

    `device`: the recipe's model.device. Raises UserError if PyTorch cannot use it.
    """
    local_rank, rank = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    own = resolve_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)  # whose random state is kept, and on which libraries launch
    if size == 1:
        return DistributedContext(own)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    return DistributedContext(own, rank, size)


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process, from the recipe's model.device.

    "auto" is a GPU if there is one, else the CPU; "cuda" is the GPU numbered `local_rank`. Raises
    UserError if PyTorch cannot use the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        usable = device.type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        hint = "; start no more processes than there are GPUs" if local_rank else ""
        raise UserError(f"model.device={name} is not available; PyTorch has {_devices()}{hint}")
    return device


def _devices() -> str:
    """The devices of this machine that PyTorch can use, in words."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return "only cpu here"
    return f"cpu and {torch.accelerator.device_count()} x {accelerator.type} here"
