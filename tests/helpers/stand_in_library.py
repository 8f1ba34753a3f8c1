"""What PyTorch's CPU build lacks of CUDA for the stand-in: a device to be current. Built once."""

import ctypes
import importlib.util
import os
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("stand_in_gpu.cpp")


def load() -> None:
    """Load it into this process; PyTorch must not be imported yet, for it asks only once."""
    library = Path(tempfile.gettempdir()) / f"opsd_stand_in_{version('torch')}.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        _build(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _build(library: Path) -> None:
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        places = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
        compiler = os.environ.get("CXX", "c++")
        flags = ["-std=c++20", "-shared", "-fPIC", "-Wno-psabi"]
        command = [compiler, *flags, str(SOURCE), "-o", str(made), *places, "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        os.replace(made, library)
