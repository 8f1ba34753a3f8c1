"""Peak extra memory of a call: from CUDA's allocator, or the resident set of a fresh process.

On a CPU each contender has its own process for the whole session, and ours a new one for each case:
it would find its last workspace mapped. The process loads the inputs, makes a small warm-up call,
resets the kernel's high-water mark, and makes the call.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import resident
from benchmarks.environment import ROOT
from benchmarks.losses.cases import find
from benchmarks.losses.contenders import Contender, contenders
from benchmarks.losses.inputs import Inputs

_MIB = 2**20


class Memory(Protocol):
    """A way to measure; `method` describes it in the JSON file."""

    method: str

    def measure(self, contender: Contender, x: Inputs) -> dict[str, Any]:
        """{"peak_extra_mib": {"forward", "backward", "both"}}, or None with "peak_why"."""


class NoMemory:
    """Measures nothing, for runs that only check that everything works."""

    method = "not measured"

    def measure(self, contender: Contender, x: Inputs) -> dict[str, Any]:
        """Nothing, with the reason."""
        return {"peak_extra_mib": None, "peak_why": "not asked for"}


class CudaMemory:
    """CUDA's allocator."""

    method = "growth of torch.cuda.max_memory_allocated over one warm call"

    def measure(self, contender: Contender, x: Inputs) -> dict[str, Any]:
        """The peaks of one call in this process."""
        x.clear()
        gc.collect()
        before = torch.cuda.memory_allocated()

        def reset() -> None:
            torch.cuda.reset_peak_memory_stats()

        peaks = _halves(contender, x, reset, lambda: torch.cuda.max_memory_allocated() - before)
        x.clear()
        return {"peak_extra_mib": peaks}


class ProcessMemory:
    """A process per contender, which waits for cases; a context manager."""

    method = (
        "growth of the resident set over one call after a small warm one, in a fresh process per "
        "contender, and for ours per case, with MALLOC_MMAP_THRESHOLD_ set so that freed buffers "
        "leave it"
    )

    def __init__(self) -> None:
        self.workers: dict[str, subprocess.Popen] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.saved: Inputs | None = None

    def __enter__(self) -> ProcessMemory:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.workers):
            self._stop(name)
        self.folder.cleanup()

    def measure(self, contender: Contender, x: Inputs) -> dict[str, Any]:
        """The peaks of one call in the contender's process. Raises RuntimeError if it has died."""
        if reason := resident.why_not():
            return {"peak_extra_mib": None, "peak_why": reason}
        worker = self.workers.get(contender.name) or self._start(contender.name)
        path = Path(self.folder.name) / "inputs.pt"
        if self.saved is not x:
            x.save(path)
            self.saved = x
        worker.stdin.write(json.dumps([x.case.id, str(path)]) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"{contender.name}: the process that measures its memory died in {x.case.id}; "
                "its error is printed above"
            )
        if contender.role == "ours":
            self._stop(contender.name)
        return {"peak_extra_mib": json.loads(answer)}

    def _stop(self, name: str) -> None:
        worker = self.workers.pop(name)
        worker.stdin.close()
        worker.wait()

    def _start(self, name: str) -> subprocess.Popen:
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.losses.memory", name],
            cwd=ROOT,
            env=os.environ | resident.WORKER_ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.workers[name] = worker
        return worker


@contextmanager
def memory_for(device: torch.device) -> Iterator[Memory]:
    """The way to measure memory on this device."""
    if device.type == "cuda":
        yield CudaMemory()
        return
    with ProcessMemory() as chosen:
        yield chosen


def _halves(contender: Contender, x: Inputs, reset: Any, peak: Any) -> dict[str, float]:
    """Peak MiB of forward and of backward, above the memory in use before the call."""
    floor = contender.role == "floor"
    with torch.set_grad_enabled(x.case.differentiated and not floor):
        reset()
        result = contender.call(x)
        found = {"forward": peak()}
        if x.case.differentiated:
            reset()
            result() if floor else result.backward()
            found["backward"] = peak()
            found["both"] = max(found.values())
    return {name: round(value / _MIB, 2) for name, value in found.items()}


def _serve(name: str) -> None:
    """Answer [case id, file of its inputs] on stdin with peaks on stdout, a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print goes to stderr
    device = torch.device("cpu")
    for line in sys.stdin:
        identifier, path = json.loads(line)
        x = Inputs.load(find(identifier), Path(path))
        contender = next(c for c in contenders(x.case, device) if c.name == name)
        answers.write(json.dumps(_resident(contender, x)) + "\n")
        answers.flush()


def _resident(contender: Contender, x: Inputs) -> dict[str, float]:
    torch.compiler.reset()  # as in runner.py: Dynamo limits recompilations
    # A contender that compiles must compile for this shape; the others only load libraries.
    warm = x if contender.compiles else Inputs(x.case.small, x.student.device)
    _halves(contender, warm, lambda: None, lambda: 0)
    x.clear()
    del warm
    gc.collect()
    before = resident.resident()
    return _halves(contender, x, resident.reset_peak, lambda: resident.peak() - before)


if __name__ == "__main__":
    _serve(sys.argv[1])
