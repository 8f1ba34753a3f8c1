"""Lets the tests run straight from the tree, whether or not the package is installed."""

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton kernels run: the GPU, or the CPU under Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.fixture
def wide_tiles(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a fused kernel's tiles of 256 columns, for vocabularies of thousands: it
    takes as long for a narrow tile as for a wide one."""
    if triton_device == "cpu":
        from opsd_kernels.backends import triton_launch

        sizes = triton_launch.Blocks(16, 256, 16, 1, 1, 2)
        monkeypatch.setattr(triton_launch, "blocks", lambda **_: sizes)


@pytest.fixture
def ieee_float32() -> Iterator[None]:
    """Products of fp32 on a GPU round no operand to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


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
    """Of every grid of kernel tests all but a pairwise part is marked exhaustive: any two values of
    two parameters still meet, so that a kernel that is wrong for one value or one pair fails."""
    grids: dict[str, list[pytest.Function]] = {}
    for item in items:
        left_out = any(item.get_closest_marker(name) for name in ("slow", "gpu", "exhaustive"))
        if not left_out and item.path.parent == HERE:
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
    """Names and values of the parameters; none for a single list of cases, which all run."""
    spec, marks = getattr(item, "callspec", None), list(item.iter_markers("parametrize"))
    if spec is None or (len(marks) == 1 and set(spec.params) == set(_names(marks[0].args[0]))):
        return []
    return sorted((name, repr(value)) for name, value in spec.params.items())


def _names(argnames: str | Sequence[str]) -> list[str]:
    return argnames.replace(" ", "").split(",") if isinstance(argnames, str) else list(argnames)


def pytest_configure(config: pytest.Config) -> None:
    # Kernels are interpreted or not from their import on: before any test imports them otherwise.
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("opsd_kernels.backends.triton_backend")
        importlib.import_module("tests.helpers.interpreter").prepare()
