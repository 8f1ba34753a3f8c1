"""Buffers are written before they are read: whatever lay in their memory, results are the same."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils import deterministic

from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import move, prepare, run, same_bits
from tests.helpers.triton_cases import KINDS, TRAINED


@pytest.fixture
def filled() -> Iterator[None]:
    """Every new buffer holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


@TRAINED
@pytest.mark.parametrize("name", KINDS)
def test_filled_buffers_give_the_same_bits(
    name: str, trained: bool, place: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    device, schedule = place
    pair = move(make_pair(21, 16, 131, masked=3, dtype=torch.float32), device)
    loss, inputs, wrt, options = prepare(name, pair, trained, None)
    # Several blocks of rows, the last a smaller one.
    options = {**options, "schedule": schedule, "workspace_bytes": 16_000}
    expected = run(loss.fn, inputs, wrt, **options)
    request.getfixturevalue("filled")
    same_bits(expected, run(loss.fn, inputs, wrt, **options))
