"""The tiny model, written once a session."""

from pathlib import Path

import pytest
from tiny import save_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))
