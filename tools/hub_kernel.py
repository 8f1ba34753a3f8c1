"""Writes opsd_kernels as a kernel of the Hugging Face hub: Triton and PyTorch, no C++.

    python tools/hub_kernel.py [FOLDER]        (make hub-kernel: build/hub-kernel)

    FOLDER/build.toml, CARD.md                 source of a `torch-noarch` kernel:
    FOLDER/torch-ext/opsd_kernels/             kernel-builder adds its _ops.py
    FOLDER/build/torch-cpu/, torch-cuda/       what kernels.get_local_kernel(FOLDER) loads

Several versions of a kernel may be loaded into one process, each under a name of its own. So
imports become relative, and operators are registered in the namespace that `_ops.py` names. The
namespace ends with a hash of the sources.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "opsd_kernels"
BACKENDS = ("cpu", "cuda")
VERSION = 1  # of the kernel's public functions: the hub's branch v1
LICENSE = "Apache-2.0"
LEFT_OUT = ("integrations",)

BUILD_TOML = f"""\
[general]
name = "{PACKAGE.replace("_", "-")}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
CARD = """\
---
library_name: kernels
license: apache-2.0
---

Distillation losses from hidden states and LM-head weights, without the logits: Triton on a GPU,
plain PyTorch elsewhere. For Python 3.11 and newer, torch 2.11 and newer.
"""
OPS = '''\
"""The namespace of this build's operators."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """Name of an operator in this build's namespace."""
    return f"{namespace}::{{op_name}}"
'''


def main(folder: Path) -> None:
    """Write the kernel's source and its builds; whatever the folder held is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = kernel_sources()
    write(folder, {"build.toml": BUILD_TOML, "CARD.md": CARD})
    write(folder / "torch-ext" / PACKAGE, sources)
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:7]
    for backend in BACKENDS:
        namespace = f"_{PACKAGE}_{backend}_{digest}"
        files = {**sources, "_ops.py": OPS.format(namespace=namespace)}
        metadata = json.dumps(metadata_of(namespace, backend, files), indent=2)
        write(folder / "build" / f"torch-{backend}", {**files, "metadata.json": metadata})


def kernel_sources() -> dict[str, str]:
    """Text of each file of the kernel, by its path inside the package."""
    package = ROOT / PACKAGE
    paths = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    kept = [path for path in paths if path.parts[0] not in LEFT_OUT]
    return {path.as_posix(): kernel_source(path, (package / path).read_text()) for path in kept}


def kernel_source(path: Path, text: str) -> str:
    """The file with relative imports, and with its operators in the namespace of `_ops.py`.

    Raises ValueError where the package is imported, or an operator named, in another way.
    """
    dots = "." * len(path.parts)
    text, registered = re.subn(rf'"{PACKAGE}::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text, looked_up = re.subn(rf"\btorch\.ops\.{PACKAGE}\b", "ops", text)
    names = ["add_op_namespace_prefix"] * bool(registered) + ["ops"] * bool(looked_up)
    if names:
        line = f"from {PACKAGE}._ops import {', '.join(names)}\n"
        text = re.sub(rf"^(?=from {PACKAGE}\b)", line, text, count=1, flags=re.MULTILINE)
    text = re.sub(rf"^(\s*)from {PACKAGE}\.?", rf"\1from {dots}", text, flags=re.MULTILINE)
    text = re.sub(
        rf'\b(import_module|find_spec)\("{PACKAGE}(\.[\w.]+)"\)',
        lambda found: f'{found[1]}("{dots[1:]}{found[2]}", __package__)',
        text,
    )
    refuse_absolute(path, text)
    return text


def refuse_absolute(path: Path, text: str) -> None:
    """Raise ValueError if the file still names the package in code."""
    for node in ast.walk(ast.parse(text)):
        named: list[str | None] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            named = [node.module]
        elif isinstance(node, ast.Attribute):
            named = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A whole string that is a module or an operator; prose may name the package.
            named = [node.value] if re.fullmatch(r"[\w.:]+", node.value) else []
        for name in named:
            if name is not None and re.split(r"[.:]", name)[0] == PACKAGE:
                where = f"{PACKAGE}/{path}:{getattr(node, 'lineno', 0)}"
                raise ValueError(f"{where}: {name} is not relative; teach tools/hub_kernel.py")


def metadata_of(namespace: str, backend: str, files: dict[str, str]) -> dict[str, object]:
    """metadata.json of a build: `kernels` imports the module under its id."""
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(files.items())
    }
    return {
        "name": PACKAGE.replace("_", "-"),
        "id": namespace,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }


def write(folder: Path, files: dict[str, str]) -> None:
    """Write each text to its path inside the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub-kernel")
