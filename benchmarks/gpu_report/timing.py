"""Milliseconds of a call on a device, and of every kernel and operator inside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Mark = Any  # an event, or seconds on a CPU


def mark(device: torch.device) -> Mark:
    """A point in time on the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(first: Mark, last: Mark) -> float:
    """Milliseconds between two marks; a GPU must have finished the work before the last."""
    if isinstance(first, float):
        return 1000 * (last - first)
    return first.elapsed_time(last)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `repeats` calls, after a warm-up call."""
    call()
    marks = []
    for _ in range(repeats):
        first = mark(device)
        call()
        marks.append((first, mark(device)))
    synchronize(device)
    return statistics.median(milliseconds(*pair) for pair in marks)


def parts(call: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """(calls, total ms) of every kernel inside a call, by name.

    On a GPU they are from torch's profiler; on a CPU of Triton's launches and ATen operators.
    """
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            synchronize(device)
        events = [e for e in profile.key_averages() if e.self_device_time_total]
        return {e.key[:120]: (e.count, e.self_device_time_total / 1000) for e in events}
    timeline = Timeline(device)
    with timeline.watching():
        call()
    return timeline.totals()


class Timeline:
    """Records name and time marks of every Triton launch and ATen operator within `watching`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Mark, Mark]] = []
        self.launched: set[str] = set()  # names of Triton's kernels

    def totals(self) -> dict[str, tuple[int, float]]:
        """(calls, total ms) by name."""
        synchronize(self.device)
        found: dict[str, tuple[int, float]] = {}
        for name, first, last in self.marks:
            calls, total = found.get(name, (0, 0.0))
            found[name] = calls + 1, total + milliseconds(first, last)
        return found

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record within this context."""
        from triton.runtime.interpreter import GridExecutor
        from triton.runtime.jit import JITFunction

        from opsd_kernels.backends import triton_backend

        launches = ((JITFunction, "run"), (GridExecutor, "__call__"))
        with ExitStack() as patches, _Operators(self):
            for owner, name in launches:
                patches.enter_context(mock.patch.object(owner, name, self._launch(owner, name)))
            # A dispatch mode does not see inside a registered operator: enter it again there.
            for name in ("divergence", "logprob"):
                inner = self._inside(getattr(triton_backend, name))
                patches.enter_context(mock.patch.object(triton_backend, name, inner))
            yield

    def _launch(self, owner: type, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        @wraps(original)
        def timed(kernel: Any, *arguments: Any, **options: Any) -> Any:
            label, first = kernel.fn.__name__, mark(self.device)
            result = original(kernel, *arguments, **options)
            self.marks.append((label, first, mark(self.device)))
            self.launched.add(label)
            return result

        return timed

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            with _Operators(self):
                return function(*arguments, **options)

        return watched


class _Operators(TorchDispatchMode):
    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self.timeline = timeline

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.is_view or name.startswith(("empty", "new_empty", "detach")):
            return function(*args, **kwargs)
        before = len(self.timeline.marks)
        first = mark(self.timeline.device)
        result = function(*args, **kwargs)
        if len(self.timeline.marks) == before:  # nothing inside it was recorded
            shapes = " x ".join(str(tuple(x.shape)) for x in args if isinstance(x, torch.Tensor))
            label = f"{name} {shapes}" if name in ("mm", "addmm", "addmm_") else name
            self.timeline.marks.append((label, first, mark(self.timeline.device)))
        return result
