"""Lets the tests run straight from the tree, whether or not the package is installed."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


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


def pytest_configure(config: pytest.Config) -> None:
    # Kernels are interpreted or not from their import on: before any test imports them otherwise.
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("opsd_kernels.backends.triton_backend")
    config.addinivalue_line("markers", "slow: minutes rather than seconds")
