"""The tiny model, written once a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny import save_model
from tests.helpers.verdicts import one_grader


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", autouse=True)
def shared_grader() -> Iterator[None]:
    with one_grader():
        yield
