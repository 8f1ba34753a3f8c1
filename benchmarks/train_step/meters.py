"""Seconds by phase and peak memory of one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from benchmarks import resident

PHASES = ("rollout", "teacher forward", "student forward", "loss", "backward", "optimizer")
OTHER = "other"

_MIB = 2**20


class Phases:
    """Seconds by phase since the last `start`; phases do not nest."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Reset all phases and start the total."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._started = now()

    def stop(self) -> tuple[float, dict[str, float]]:
        """Total seconds, and seconds by phase with the rest as `other`."""
        total = now() - self._started
        return total, self.seconds | {OTHER: total - sum(self.seconds.values())}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count the time spent within the context as `phase`."""
        began = now()
        yield
        self.seconds[phase] += now() - began

    def wrap(self, owner: Any, name: str, phase: str | Callable[[], str]) -> None:
        """Count every call of `owner.name` as `phase`, or as what `phase` returns for that call."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(phase() if callable(phase) else phase):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    def wrap_torch(self) -> None:
        """Count backward, clipping and AdamW's step. Call it before an AdamW is created."""
        self.wrap(torch.Tensor, "backward", "backward")
        self.wrap(torch.nn.utils, "clip_grad_norm_", "optimizer")
        self.wrap(torch.optim.AdamW, "step", "optimizer")


def forward_phase() -> str:
    """The phase of a forward pass: only the student's builds a graph."""
    return "student forward" if torch.is_grad_enabled() else "teacher forward"


def now() -> float:
    """Seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Memory:
    """Peak of CUDA's allocator, or of this process's resident set (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.why_not = None if self._cuda else resident.why_not()

    def start(self) -> None:
        """Reset the peak."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif not self.why_not:
            self._before = resident.resident()
            resident.reset_peak()

    def stop(self) -> dict[str, float | None]:
        """`peak_mib`, and `peak_extra_mib` above the use at the start; None: not measured."""
        if self.why_not:
            return {"peak_extra_mib": None, "peak_mib": None}
        peak = torch.cuda.max_memory_allocated() if self._cuda else resident.peak()
        extra = peak - self._before
        return {"peak_extra_mib": round(extra / _MIB, 1), "peak_mib": round(peak / _MIB, 1)}
