"""The peak of this process's resident set, measured where it means something (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
# Of the process that measures itself. Large buffers are mapped by themselves: glibc would keep
# freed ones in the resident set, where they hide a part of the next peak or, by fragmentation, add
# to it. Threads that wait sleep: the next process gets all cores.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_WAIT_POLICY": "passive"}


def why_not() -> str | None:
    """Why the peak cannot be measured here."""
    return None if os.access(_CLEAR_REFS, os.W_OK) else f"needs a writable {_CLEAR_REFS} (Linux)"


def resident() -> int:
    """Bytes now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """The high-water mark starts again from here."""
    _CLEAR_REFS.write_text("5")


def peak() -> int:
    """Bytes at most since the last reset."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise KeyError(key)
