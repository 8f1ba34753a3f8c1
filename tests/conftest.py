"""Before any test imports Triton: it can run kernels here without a GPU. And --backend."""

import gc
import importlib.util
import os
from collections.abc import Iterator

# Idle OpenMP threads that spin make small tensors six times slower on busy cores. OpenMP reads this
# when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.helpers import devices, stand_in_library

if devices.CHOICE == "stand-in":
    stand_in_library.load()  # before PyTorch, which asks for it once

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # Triton's own functions are interpreted for good or compiled for good when they are imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores; more threads than cores make all of them slower.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(scope="session", autouse=True)
def _stand_in() -> Iterator[None]:
    """The stand-in for a GPU around all tests, if they ask for it."""
    if devices.CHOICE != "stand-in":
        yield
        return
    from tests.helpers.stand_in_gpu import stand_in_gpu  # it imports PyTorch

    with stand_in_gpu():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of tests that run on both of the CPU's backends, only this one's: cpp or torch"
    parser.addoption("--backend", choices=("cpp", "torch"), help=text)


@pytest.hookimpl(tryfirst=True)  # a grid is cut down to its pairs after the other backend is gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--backend")
    if chosen is None:
        return

    def kept(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        return callspec is None or callspec.params.get("cpu_backend", chosen) == chosen

    config.hook.pytest_deselected(items=[item for item in items if not kept(item)])
    items[:] = [item for item in items if kept(item)]


def pytest_collection_finish() -> None:
    """What the imports made stays: to look for garbage among it takes a trainer 0.4 s a run."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
