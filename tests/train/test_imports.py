"""Imports point one way: between the packages, and between the folders of opsd_train."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "opsd_kernels": {"opsd_train", "benchmarks", "tests"},
    "opsd_train": {"benchmarks", "tests"},
}


@cache
def imported_modules(path: Path) -> list[str]:
    """Full names of what a file imports, inside functions too: "opsd_train.config.errors.X"."""
    package, names = path.relative_to(ROOT).parent.parts, []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{origin}.{alias.name}" for alias in node.names]
    return names


def folder_graph(package: str) -> dict[str, set[str]]:
    """The folders and top-level modules of a package, each with those that it imports."""
    graph: dict[str, set[str]] = {}
    for path in (ROOT / package).rglob("*.py"):
        own = path.relative_to(ROOT / package).with_suffix("").parts[0]
        imports = graph.setdefault(own, set())
        for name in imported_modules(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] != own:
                imports.add(parts[1])
    return graph


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_in_one_direction(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imported_modules(path)
        if name.split(".")[0] in FORBIDDEN[package]
    }
    assert paths and not found


def test_the_trainer_uses_the_kernels() -> None:
    names = {n for path in (ROOT / "opsd_train").rglob("*.py") for n in imported_modules(path)}
    assert any(name.split(".")[0] == "opsd_kernels" for name in names)


def test_folders_of_the_trainer_have_no_circle() -> None:
    graph = folder_graph("opsd_train")
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert graph["model"] >= {"config", "data", "distributed"}
    assert order.index("config") < order.index("methods") < order.index("trainer")
