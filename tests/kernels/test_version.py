"""The version has one source, `opsd_kernels.__version__`, also for the installed package."""

import ast
import tomllib
import warnings
from pathlib import Path

import pytest

import opsd_kernels

ROOT = Path(__file__).resolve().parents[2]


def test_pyproject_reads_the_version_of_the_package() -> None:
    """As a literal, which setuptools reads without importing torch."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in config["project"] and "version" in config["project"]["dynamic"]
    assert config["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "opsd_kernels.__version__"
    source = ast.parse((ROOT / "opsd_kernels" / "__init__.py").read_text(encoding="utf-8"))
    literals = [
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert literals == [opsd_kernels.__version__]


def test_setuptools_builds_that_version() -> None:
    pyprojecttoml = pytest.importorskip("setuptools.config.pyprojecttoml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that setuptools still calls beta
        config = pyprojecttoml.read_configuration(ROOT / "pyproject.toml")
    assert config["project"]["version"] == opsd_kernels.__version__
