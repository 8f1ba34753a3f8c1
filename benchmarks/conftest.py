"""Options of `pytest benchmarks`, the cases they select, what is printed and written at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import ROOT, default_device, total_memory
from benchmarks.losses.cases import COMPILED, check_cases, default_cases, full_cases
from benchmarks.losses.memory import NoMemory, memory_for
from benchmarks.losses.record import Record
from benchmarks.losses.table import render

_RECORD = pytest.StashKey[Record]()
_PATH = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("opsd", "benchmarks of the losses")
    group.addoption(
        "--benchmark", action="store_true", help="measure; without it the contenders are only run"
    )
    group.addoption("--full", action="store_true", help="every case that fits (hours on a CPU)")
    group.addoption(
        "--results",
        type=Path,
        help="where the JSON goes (default: runs/benchmarks/losses-<device kind>-<time>.json)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config, device = metafunc.config, default_device()
    if not config.option.benchmark:
        cases = check_cases()
    elif config.option.full:
        cases = full_cases(device, total_memory(device))
    else:
        cases = default_cases(device)
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_configure(config: pytest.Config) -> None:
    measuring = getattr(config.option, "benchmark", False)
    config.stash[_RECORD] = Record()
    results = getattr(config.option, "results", None)
    config.stash[_PATH] = results or _new_path(default_device().type)
    if not measuring and config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_disable = True


@pytest.fixture(scope="session")
def device():
    return default_device()


@pytest.fixture(scope="session")
def memory(request, device):
    """How peak memory is measured in this session."""
    if not request.config.option.benchmark:
        yield NoMemory()
        return
    with memory_for(device) as chosen:
        request.config.stash[_RECORD].memory_method = chosen.method
        yield chosen


@pytest.fixture
def record(request):
    """What is measured; written after every case, so that an interrupted run keeps its figures."""
    found = request.config.stash[_RECORD]
    yield found
    if request.config.option.benchmark and found.cases:
        found.write(request.config.stash[_PATH])


@pytest.fixture
def with_compiled(request, case) -> bool:
    """Whether contenders that compile take part."""
    option, device = request.config.option, default_device()
    return option.benchmark and (option.full or case in default_cases(device)[:COMPILED])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    record = config.stash[_RECORD]
    if not config.option.benchmark or not record.cases:
        return
    terminalreporter.write_sep("=", "losses")
    terminalreporter.write(render(record.as_json()))
    record.write(config.stash[_PATH])
    terminalreporter.write_line(
        f"wrote {config.stash[_PATH]}; python -m benchmarks.report draws it"
    )


def _new_path(kind: str) -> Path:
    return ROOT / "runs" / "benchmarks" / f"losses-{kind}-{time.strftime('%Y%m%d-%H%M%S')}.json"
