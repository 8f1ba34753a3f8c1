"""The optional C++ operators of the CPU; everything else is in pyproject.toml.

They are built where torch and a C++ compiler are found: `pip install --no-build-isolation`. Else
the installation goes on without them, and the PyTorch backend serves.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def extension() -> dict[str, object]:
    """Arguments of setup() that build opsd_kernels._cpu, or none."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.stderr.write("opsd: built without the C++ operators, there is no torch here\n")
        return {}
    compiler = [] if os.name == "nt" else ["-O3", "-g0", "-std=c++20", "-Wno-psabi"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    module = CppExtension(
        "opsd_kernels._cpu",
        sources,
        extra_compile_args=compiler + threads,
        extra_link_args=threads,
        optional=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
