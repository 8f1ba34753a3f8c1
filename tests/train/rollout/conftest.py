"""What the tests of rollouts share."""

from collections.abc import Iterator

import pytest

from tests.helpers.vllm_double import VllmDouble, tiny


@pytest.fixture
def doubles() -> Iterator[list[VllmDouble]]:
    """Two servers of the tiny model."""
    made = [VllmDouble(tiny()), VllmDouble(tiny())]
    yield made
    for double in made:
        double.held.clear()
        double.kill()
