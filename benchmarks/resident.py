"""The resident set of this process and its peak, in bytes (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
# Environment of a process that measures itself. Large buffers get a mapping each: glibc would keep
# freed ones in the resident set, which hides a part of the next peak or, by fragmentation, adds to
# it. Waiting threads sleep, so the next process gets all cores.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_WAIT_POLICY": "passive"}


def why_not() -> str | None:
    """What measuring the peak needs and this machine lacks; None where it has it."""
    return None if os.access(_CLEAR_REFS, os.W_OK) else f"needs a writable {_CLEAR_REFS} (Linux)"


def resident() -> int:
    """Bytes that are resident now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Begin a new peak here."""
    _CLEAR_REFS.write_text("5")


def peak() -> int:
    """The most bytes that were resident since the last reset."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise KeyError(key)
