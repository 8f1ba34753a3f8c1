"""Declared dependencies are the imported ones, package by package and both ways; versions agree."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STANDARD = set(sys.stdlib_module_names)
OWN = {"opsd_kernels", "opsd_train", "benchmarks", "examples", "tests", "conftest"}

# Who imports: the extras it is installed with. torch is always there.
EXTRAS = {
    "opsd_kernels": ("transformers", "trl"),
    "opsd_train": ("train", "demo", "hub"),
    "tests": ("train", "demo", "hub", "test"),
    "benchmarks": ("train", "demo", "hub", "bench"),
    "examples": ("train", "trl"),
}
# The extras that exist for a folder.
OWN_EXTRAS = {
    "opsd_kernels": ("transformers", "trl"),
    "opsd_train": ("train", "demo", "hub"),
    "tests": ("test",),
    "benchmarks": ("bench",),
}
# Imported without being declared, each with the reason.
NOT_DECLARED = {
    "opsd_kernels": {"triton"},  # torch brings it; without it the other backends serve
    "opsd_train": {"vllm"},  # rollout.engine=vllm: an environment of its own, `make vllm`
    "tests": set(),
    "benchmarks": {
        "triton",  # torch brings it
        "tokenizers",  # transformers brings it
        "quack",  # a contender on H100s, left out where it is not installed
    },
    "examples": {
        "datasets",  # TRL brings it
        "swift",  # a plugin of ms-swift runs inside it
    },
}
# Declared without being imported, each with the reason.
NOT_IMPORTED = {
    "opsd_kernels": set(),
    "opsd_train": {
        "gguf",  # transformers reads the demo's model with it
        "tensorboard",  # torch.utils.tensorboard imports it
    },
    "tests": {
        "mypy",  # a command of `make check`
        "pytest-xdist",  # a plugin: pytest -n 2
        "ruff",  # a command of `make check`
        "types-pyyaml",  # mypy reads it
    },
    "benchmarks": {"pytest-benchmark"},  # a plugin: the fixture `benchmark`
}
# Imported under another name than installed under.
INSTALLED_AS = {"yaml": "pyyaml"}
# importlib.import_module("pyarrow.parquet"), and opsd_train/data/files.py's own _module.
BY_NAME = re.compile(r"\b(?:import_module|_module)\(\s*\"(\w+)")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = {normal(line.split("==")[0]): line.split("==")[1] for line in LINES if "==" in line}


@functools.cache
def imported(package: str) -> set[str]:
    """Installed names of what a folder's files import, by statement or by name."""
    found: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(BY_NAME.findall(text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return {normal(INSTALLED_AS.get(name, name)) for name in found - OWN - STANDARD}


def declared(*extras: str) -> set[str]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}


@pytest.mark.parametrize("folder", [name for name in EXTRAS if (ROOT / name).exists()])
def test_what_is_imported_is_declared(folder: str) -> None:
    """Equal, so that an exception goes when its import does."""
    assert imported(folder) - declared(*EXTRAS[folder]) == NOT_DECLARED[folder]


@pytest.mark.parametrize("folder", OWN_EXTRAS)
def test_what_is_declared_is_imported(folder: str) -> None:
    unused = declared(*OWN_EXTRAS[folder]) - imported(folder)
    assert unused - {"torch"} == NOT_IMPORTED[folder]


def test_every_declared_version_is_pinned() -> None:
    """In constraints.txt, and torch in the Makefile."""
    assert declared(*PROJECT["optional-dependencies"]) - {"torch"} <= PINNED.keys()


def test_pre_commit_has_the_same_ruff() -> None:
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["repo"].endswith("/ruff-pre-commit")
    assert hooks["rev"] == f"v{PINNED['ruff']}"


def test_workflows_test_the_oldest_and_the_newest_torch() -> None:
    """torch>=... is promised, and CI's own version is the Makefile's."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]
    newest = re.search(r"^DEFAULT := torch==(\S+)", (ROOT / "Makefile").read_text(), re.M)[1]
    (oldest,) = (line for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert tested["torch"] == [f"{oldest.removeprefix('torch>=')}.0", newest]
    assert PROJECT["requires-python"] == f">={tested['python'][0]}"
