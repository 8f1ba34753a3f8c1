"""Lets the tests run straight from the tree, whether or not the package is installed."""

import importlib.util
import itertools
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton kernels run: the GPU, or the CPU under Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.fixture(scope="module", params=["cpp", "torch"])
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both backends of the CPU, one after the other."""
    yield from _only(request.param)


@pytest.fixture(scope="module")
def torch_backend() -> Iterator[str]:
    """The PyTorch backend, though the C++ operators may be there."""
    yield from _only("torch")


@pytest.fixture(params=["blocked", "streaming", "cpp", "torch"])
def place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """(device, schedule) in Triton, where `tiled` runs what `blocked` does, and of the CPU's."""
    if request.param in ("blocked", "streaming"):
        yield request.getfixturevalue("triton_device"), request.param
        return
    from opsd_kernels import extension

    if request.param == "torch":
        monkeypatch.setattr(extension, "serves", lambda device, *dtypes: False)
    elif not extension.loaded():
        pytest.skip("the C++ operators are not built")
    yield "cpu", "blocked"


def _only(backend: str) -> Iterator[str]:
    from opsd_kernels import extension

    if backend == "cpp" and not extension.loaded():
        pytest.skip("the C++ operators are not built")
    with pytest.MonkeyPatch.context() as patch:
        if backend == "torch":
            patch.setattr(extension, "serves", lambda device, *dtypes: False)
        yield backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a grid that Triton's interpreter runs, seconds a row, all but a pairwise part is marked
    exhaustive: any two values of two parameters still meet."""
    grids: dict[str, list[pytest.Function]] = {}
    for item in items:
        slow = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if not slow and {"triton_device", "place"} & set(getattr(item, "fixturenames", ())):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in grids.values():
        for item in set(grid).difference(_pairwise(grid)):
            item.add_marker(pytest.mark.exhaustive)


def _pairwise(grid: list[pytest.Function]) -> list[pytest.Function]:
    """A small part of the grid with every pair of values that the grid has, the same each time."""
    pairs = {item: set(itertools.combinations(_values(item), 2)) for item in grid}
    wanted, chosen = set().union(*pairs.values()), []
    while wanted:
        best = max(grid, key=lambda item: len(pairs[item] & wanted))
        chosen.append(best)
        wanted -= pairs[best]
    return chosen or grid


def _values(item: pytest.Function) -> list[tuple[str, str]]:
    spec = getattr(item, "callspec", None)
    return sorted((name, repr(value)) for name, value in spec.params.items()) if spec else []


def pytest_configure(config: pytest.Config) -> None:
    # Kernels are interpreted or not from their import on: before any test imports them otherwise.
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("opsd_kernels.backends.triton_backend")
    config.addinivalue_line("markers", "slow: minutes rather than seconds")
