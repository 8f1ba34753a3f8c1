"""Wall-clock time by phase, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall-clock seconds by phase: `with timer.phase("rollout"): ...`.

    `failed`: the innermost phase in which an error was raised; None if there was none.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: str | None = None
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent within the context to the phase `name`, a GPU's work included."""
        _wait_for_gpu()
        start = time.perf_counter()
        try:
            yield
            _wait_for_gpu()
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self.seconds[name] += time.perf_counter() - start

    def add(self, seconds: dict[str, float]) -> None:
        """Add the seconds of an earlier process of the same run: by phase, and their "total"."""
        earlier = dict(seconds)
        self._start -= earlier.pop("total")
        for name, spent in earlier.items():
            self.seconds[name] += spent

    def total(self) -> float:
        """Seconds that the processes of this run have lasted, inside and outside of phases."""
        return time.perf_counter() - self._start


def _wait_for_gpu() -> None:
    """Wait for what this thread has launched: the host runs ahead of a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def peak_memory_mib(device: torch.device) -> float:
    """Peak in MiB of CUDA's allocator or, on a CPU, of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)  # bytes on macOS, else KiB
