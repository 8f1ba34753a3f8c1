"""Where a run's time and memory go."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def add(self, seconds: dict[str, float]) -> None:
        """Count what an earlier process of the same run took; its "total" goes into ours."""
        earlier = dict(seconds)
        self._start -= earlier.pop("total")
        for name, spent in earlier.items():
            self.seconds[name] += spent

    def total(self) -> float:
        return time.perf_counter() - self._start


def peak_memory_mib(device: torch.device) -> float:
    """Peak of CUDA's allocator, or of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)
