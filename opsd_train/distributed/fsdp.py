"""FSDP2 sharding of a causal LM, full weights for generation, and a second copy of the weights.

`fully_shard` is applied to each decoder layer, then to the causal LM, whose group holds the
embeddings, the final norm and the head. The losses read the head's weight, so they run inside the
causal LM's own forward (model.policy), where FSDP has gathered it: outside, a shard of the head
would pass for the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from opsd_train.distributed.context import DistributedContext

Result = TypeVar("Result")


def shard(
    core: nn.Module,
    layers: Iterable[nn.Module],
    context: DistributedContext,
    mode: str,
    dtype: torch.dtype,
) -> None:
    """Shard a causal LM and its decoder `layers` over the ranks, in place.

    `mode`: "full" shards the weights; "none" keeps a replica on each rank. Parameters are gathered
    in `dtype`. Gradients are reduced in fp32 and summed, not averaged, because the loss already
    divides by the global token count.
    """
    kind = context.device.type
    if mode == "full":
        mesh = init_device_mesh(kind, (context.size,))
    else:  # HSDP with shards of one rank: replicas whose gradients are all-reduced
        mesh = init_device_mesh(kind, (context.size, 1), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    shard_module = partial(fully_shard, mesh=mesh, mp_policy=policy)
    for layer in layers:
        shard_module(layer)
    shard_module(core)
    for module in fsdp_modules(core):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot pre-multiply


def shard_layers(layers: Iterable[nn.Module], context: DistributedContext) -> None:
    """Shard the decoder `layers` of a frozen model; every rank keeps the rest of it whole."""
    mesh = init_device_mesh(context.device.type, (context.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def inside_forward(core: nn.Module, function: Callable[[], Result]) -> Result:
    """`function()` where the head and the embeddings of a sharded causal LM are full tensors.

    Every rank calls it with a function that makes the same forward passes.
    """

    def call() -> Result:
        return function()

    cast(Any, core)._inside_forward = call
    register_fsdp_forward_method(core, "_inside_forward")
    try:
        return cast(Any, core)._inside_forward()
    finally:
        del core._inside_forward


def set_last_backward(core: nn.Module, last: bool) -> None:
    """Say whether the next backward is the last of its optimizer step.

    Replicas (shard mode "none") all-reduce their accumulated gradients once, in that backward.
    """
    if isinstance(core, FSDPModule):
        core.set_requires_all_reduce(last)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered; a plain tensor is returned as it is. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(values: Tensor, parameter: Tensor) -> Tensor:
    """View this rank's `values` as a tensor sharded like `parameter`; shares their memory."""
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
    """Within the context all weights are full tensors in `dtype`, so each rank generates alone.

    On exit, also after an error, the trained weights are back bit for bit. Nested calls do nothing.
    """
    if all(p.dtype == dtype and not isinstance(p, DTensor) for p in core.parameters()):
        yield
        return
    with _unsharded(core) if fsdp_modules(core) else _cast(core, dtype):
        yield


@contextmanager
def _unsharded(core: nn.Module) -> Iterator[None]:
    modules = fsdp_modules(core)
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not core, recurse=False)
            module.reshard()


@contextmanager
def _cast(core: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    originals = [(p, p.data) for p in core.parameters() if p.dtype != dtype]
    try:
        for parameter, data in originals:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


class Snapshot:
    """A second set of the trained weights: their initial values, or a moving average of them.

    `values`: one tensor per trained parameter, this rank's shard of it, in the parameter's dtype.
    """

    def __init__(self, core: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Copy the current values of `parameters`, the trained ones of `core`."""
        self._core, self._parameters = core, parameters
        self._trained = [local_shard(parameter.detach()) for parameter in parameters]
        self.values = [tensor.clone() for tensor in self._trained]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model has these weights; on exit the trained ones, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Update the moving average: values = decay * values + (1 - decay) * trained."""
        torch._foreach_lerp_(self.values, self._trained, 1 - decay)

    def state(self) -> list[Tensor]:
        """The values as tensors that a distributed checkpoint can save: DTensors if sharded."""
        pairs = zip(self.values, self._parameters, strict=True)
        return [sharded_like(value, parameter) for value, parameter in pairs]

    @torch.no_grad()
    def _swap(self) -> None:
        for module in fsdp_modules(self._core):
            module.reshard()  # drop weights gathered before the swap
        for trained, value in zip(self._trained, self.values, strict=True):
            kept = trained.clone()
            trained.copy_(value)
            value.copy_(kept)


def fsdp_modules(core: nn.Module) -> list[FSDPModule]:
    """All modules of `core`, itself included, that `fully_shard` was applied to."""
    return [module for module in core.modules() if isinstance(module, FSDPModule)]
