"""The optional C++ operators of the CPU; everything else is in pyproject.toml.

They are built, against the torch they find, where there is one and a C++ compiler: `pip install
--no-build-isolation`. Else the installation goes on without them, and the PyTorch backend serves.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent


def say(text: str) -> None:
    sys.stderr.write(f"opsd: without its C++ operators for the CPU: {text}\n")


def extension() -> dict[str, object]:
    """Arguments of setup() that build opsd_kernels._cpu, or none."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        say("no torch in the build environment (pip install --no-build-isolation)")
        return {}

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (BaseError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                say(f"they did not compile: {error}")
                self.extensions.clear()  # nothing to install of them

    unix = os.name != "nt"
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir())]
    module = CppExtension(
        "opsd_kernels._cpu",
        [name for name in files if name.endswith(".cpp")],
        depends=[name for name in files if name.endswith(".h")],
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-Wno-psabi", *threads] if unix else [],
        extra_link_args=threads,
        optional=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())
