"""Each package imports what pyproject.toml declares for it, and nothing else."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = {"opsd_kernels", "opsd_train", "benchmarks", "tests"}
# Imported under another name than it is installed under.
INSTALLED_AS = {"yaml": "pyyaml"}
# Optional, with an error of its own: torch brings triton, vLLM has an environment of its own.
OPTIONAL = {"opsd_kernels": {"triton"}, "opsd_train": {"vllm"}}
EXTRAS = {"opsd_kernels": [], "opsd_train": ["train", "demo", "hub"]}
# Other packages import it: SummaryWriter, and what transformers reads GGUF files with.
NOT_IMPORTED = {"tensorboard", "gguf"}


def imported(package: str) -> set[str]:
    """Installed names of the top-level modules that a package's files import."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    found -= OWN | set(sys.stdlib_module_names)
    return {INSTALLED_AS.get(name, name).replace("_", "-") for name in found}


def declared(extras: list[str]) -> set[str]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {re.match(r"[\w.-]+", line)[0] for line in lines}


@pytest.mark.parametrize("package", EXTRAS)
def test_what_is_imported_is_declared(package: str) -> None:
    assert imported(package) <= declared(EXTRAS[package]) | OPTIONAL[package]


def test_what_is_declared_is_used() -> None:
    # Found by name, since importing them is left to what asks for them.
    by_name = {name for name in ("pyarrow", "datasets") if f'"{name}"' in _sources("opsd_train")}
    used = imported("opsd_kernels") | imported("opsd_train") | by_name | NOT_IMPORTED
    assert declared(EXTRAS["opsd_train"]) <= used


def test_the_tests_have_what_they_import() -> None:
    bench = {"trl", "liger-kernel", "cut-cross-entropy", "quack", "datasets"}
    extras = declared([*EXTRAS["opsd_train"], "test"])
    assert imported("tests") - bench - _test_modules() <= extras | OPTIONAL["opsd_train"]


def _sources(package: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in (ROOT / package).rglob("*.py"))


def _test_modules() -> set[str]:
    return {path.stem.replace("_", "-") for path in (ROOT / "tests").rglob("*.py")}
