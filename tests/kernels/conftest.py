"""Lets the tests run straight from the tree, whether or not the package is installed."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Idle OpenMP threads that spin make these small tensors six times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton kernels run: the GPU, or the CPU under Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes rather than seconds")
