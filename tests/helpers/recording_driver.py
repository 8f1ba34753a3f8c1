"""A driver for Triton that compiles for sm_90 and records launches, on a machine without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class RecordingDriver:
    """What Triton asks of a driver; `launches` holds (kernel, grid, stream, arguments)."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple, int, tuple]] = []
        self.stream = 7
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src, metadata):
        def launch(x, y, z, stream, function, packed, data, enter, leave, *arguments) -> None:
            plain = tuple(_plain(a) for a in arguments)
            self.launches.append((src.fn.fn.__name__, (x, y, z), stream, plain))

        return launch


def _plain(argument: object) -> object:
    """Tensors as their address, shape and strides."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr(), tuple(argument.shape), argument.stride()
    if isinstance(argument, tuple):
        return tuple(_plain(x) for x in argument)
    return argument


def record() -> RecordingDriver:
    """Make a RecordingDriver the active one."""
    made = RecordingDriver()
    driver.set_active(made)
    return made
