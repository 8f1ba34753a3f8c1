"""What PyTorch's CPU build lacks of CUDA for the stand-in: a device to be current. Built once."""

import ctypes
import importlib.util
import os
import re
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("stand_in_gpu.cpp")
FOLDER = Path(__file__).parents[2] / "build" / "stand_in"


def load() -> None:
    """Load it into this process; PyTorch must not be imported yet, for it asks only once.

    Raises RuntimeError for a build of PyTorch with CUDA, which has its own.
    """
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    if not re.search(r"^cuda\b.* = None$", (torch / "version.py").read_text(), re.MULTILINE):
        raise RuntimeError("OPSD_TEST_DEVICE=stand-in needs a build of PyTorch without CUDA")
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / f"{version('torch')}.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        _build(library, torch)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _build(library: Path, torch: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        places = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
        compiler = os.environ.get("CXX", "c++")
        flags = ["-std=c++20", "-shared", "-fPIC", "-Wno-psabi"]
        command = [compiler, *flags, str(SOURCE), "-o", str(made), *places, "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        os.replace(made, library)
