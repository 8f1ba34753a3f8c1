"""FSDP2 for a model, and the two states its weights can be in beside the trained one.

`fully_shard` goes over each decoder layer and then the causal LM, whose group holds embeddings,
final norm and head. The loss runs inside the causal LM's own forward (model.Policy), where the
head is a plain, whole tensor: outside of it a shard would be read as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opsd_train.distributed.context import DistributedContext
from opsd_train.model.families import layers


def shard(core: nn.Module, context: DistributedContext, mode: str, dtype: torch.dtype) -> None:
    """Shard a causal LM over the ranks ("full"), or keep a copy on each ("none").

    Parameters are gathered in `dtype`, gradients summed (the loss has the global divisor) in fp32.
    """
    kind = context.device.type
    if mode == "full":
        mesh = init_device_mesh(kind, (context.size,))
    else:  # shards of one rank: replicas whose gradients are all-reduced, by the same code
        mesh = init_device_mesh(kind, (context.size, 1), mesh_dim_names=("replicate", "shard"))
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for layer in layers(core):
        fully_shard(layer, **options)
    fully_shard(core, **options)
    for module in fsdp_modules(core):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot pre-multiply


def shard_layers(core: nn.Module, context: DistributedContext) -> None:
    """Shard the layers of a frozen teacher; its head stays whole on every rank."""
    mesh = init_device_mesh(context.device.type, (context.size,))
    for layer in layers(core):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def set_last_backward(core: nn.Module, last: bool) -> None:
    """Copies on each rank ("none") add up their gradients once, after a step's last one."""
    if isinstance(core, FSDPModule):
        core.set_requires_all_reduce(last)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, any other as it is; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(values: Tensor, parameter: Tensor) -> Tensor:
    """Local values as a tensor that is sharded as `parameter` is; the memory is the same."""
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(
        values,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@contextmanager
def full_parameters(core: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """For generation: all weights whole and in `dtype`, and no rank waits for another.

    What was trained comes back bit for bit, also after an error; within itself it does nothing.
    """
    if all(p.dtype == dtype and not isinstance(p, DTensor) for p in core.parameters()):
        yield
        return
    with _unsharded(core) if fsdp_modules(core) else _cast(core, dtype):
        yield


@contextmanager
def _unsharded(core: nn.Module) -> Iterator[None]:
    units = fsdp_modules(core)
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not core, recurse=False)
            unit.reshard()


@contextmanager
def _cast(core: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    kept = [(p, p.data) for p in core.parameters() if p.dtype != dtype]
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class Snapshot:
    """A second set of the trained weights: as they were at the start, or their moving average."""

    def __init__(self, core: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._core, self._parameters = core, parameters
        self._trained = [local(parameter.detach()) for parameter in parameters]
        self.values = [tensor.clone() for tensor in self._trained]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with these weights; the trained ones come back bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Move towards the trained weights: decay * old + (1 - decay) * trained."""
        torch._foreach_lerp_(self.values, self._trained, 1 - decay)

    def state(self) -> list[Tensor]:
        """The values for a checkpoint, which must know whose shards they are."""
        pairs = zip(self.values, self._parameters, strict=True)
        return [sharded_like(value, parameter) for value, parameter in pairs]

    @torch.no_grad()
    def _swap(self) -> None:
        for unit in fsdp_modules(self._core):
            unit.reshard()  # what was gathered before is not what is wanted now
        for trained, value in zip(self._trained, self.values, strict=True):
            kept = trained.clone()
            trained.copy_(value)
            value.copy_(kept)


def fsdp_modules(core: nn.Module) -> list[FSDPModule]:
    return [module for module in core.modules() if isinstance(module, FSDPModule)]
