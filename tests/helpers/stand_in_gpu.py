"""A stand-in for a GPU: tensors that say they are on "cuda" and are computed on the CPU.

Where there is no GPU, nobody sees a tensor that was made on the wrong device. Here an operator that
gets tensors of two devices raises, as most do on a GPU. It is an old GPU, for which the losses
run in plain PyTorch. `OPSD_TEST_DEVICE=stand-in pytest ...` runs tests on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PROPERTIES = SimpleNamespace(
    name="Stand-in", major=7, minor=5, multi_processor_count=132, total_memory=80 * 2**30
)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
PINNING = {aten.pin_memory.default, aten._pin_memory.default}
# A tensor on a GPU may be indexed by one on the CPU, not the other way round.
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class OnGpu(Tensor):
    """A tensor whose values are in `cpu_values`."""

    cpu_values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device=GPU,
        )  # fmt: skip
        made.cpu_values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = OnGpu(self.cpu_values.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:
        return f"OnGpu({self.cpu_values})"

    # What PyTorch does without an operator.

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: OnGpu) -> None:
        Tensor.data.__set__(self, new)
        self.cpu_values = new.cpu_values

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.cpu_values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.cpu_values.untyped_storage()


class Creation(TorchDispatchMode):
    """What is made on "cuda" is an `OnGpu`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Stream:
    """A stream that has done its work."""

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator's result, computed on the CPU. Raises RuntimeError as `check` does."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func in PINNING:
        return args[0]
    if kwargs.get("device") is None:
        check(func, args, tensors)
    if func.namespace == "opsd_kernels":  # its own code, so that what it makes is checked too
        with Creation():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    kwargs.pop("pin_memory", None)
    if func is aten.copy_.default:
        on_gpu = isinstance(args[0], OnGpu)
    elif kwargs.get("device") is not None:
        wanted = torch.device(kwargs["device"])
        if wanted.type == "cuda" and wanted.index not in (None, 0):
            raise RuntimeError(f"{wanted}: invalid device ordinal")
        on_gpu = wanted.type == "cuda"
        kwargs = kwargs | ({"device": CPU} if on_gpu else {})
    else:
        on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
    there, options = tree_map_only(OnGpu, lambda tensor: tensor.cpu_values, (args, kwargs))
    result = func(*there, **options)
    if not on_gpu:
        return result
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGpu, result))


def check(func: Any, args: Sequence[Any], tensors: list[Tensor]) -> None:
    """Raise RuntimeError for devices that a GPU refuses; numbers on the CPU meet any tensor."""
    if func in COPIES:
        return
    if func in INDEXING and isinstance(args[0], OnGpu):
        tensors = [tensor for tensor in (args[0], *args[2:3])]
    devices = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, OnGpu)}
    if len(devices) > 1:
        each = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{func}: tensors on two devices: {each}")


@contextmanager
def stand_in_gpu() -> Iterator[None]:
    """Within, "cuda" can be used, and `torch.cuda` answers as for one GPU."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay one
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device="cuda") is then a copy
    try:
        with pytest.MonkeyPatch.context() as patch, Creation():
            answer(patch)
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def _answer(value: Any, *_: Any, **__: Any) -> Any:
    return value


def answer(patch: pytest.MonkeyPatch) -> None:
    """Make `torch.cuda` answer."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": PROPERTIES,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "max_memory_allocated": 2**20,
        "current_stream": Stream(),
        "stream": nullcontext(),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name in ("_lazy_init", "set_device", "synchronize", "empty_cache"):
        answers[name] = None
    for name, value in answers.items():
        patch.setattr(torch.cuda, name, partial(_answer, value))
    for module in (torch.cuda, torch.cuda.random):
        patch.setattr(module, "get_rng_state", lambda *_: torch.get_rng_state())
        patch.setattr(module, "set_rng_state", lambda state, *_: torch.set_rng_state(state))
