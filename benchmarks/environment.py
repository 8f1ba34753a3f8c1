"""What stands beside every figure: device, memory, versions, commit."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "unsloth_zoo",
    "quack-kernels",
    "pytest-benchmark",
)


def environment(
    device: torch.device | None = None, packages: Sequence[str] = _PACKAGES
) -> dict[str, Any]:
    """Facts about this machine and tree, ready for JSON.

    "versions" has those of `packages`, None where one is not installed. "commit" is that of the
    source tree, None where there is none; it ends in + if files were changed or added, other than
    benchmarks/results.
    """
    device = device or default_device()
    on_gpu = device.type == "cuda"
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(total_memory(device) / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def default_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def total_memory(device: torch.device) -> int:
    """Bytes the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """None where the tree came without its history, as where the files alone were copied."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]
        dirty = subprocess.run(changed, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
