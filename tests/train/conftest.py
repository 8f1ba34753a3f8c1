"""The tiny model, written once a session; reports without their plots."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from matplotlib.figure import Figure

from tests.helpers.tiny import save_model
from tests.helpers.verdicts import one_grader


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", autouse=True)
def shared_grader() -> Iterator[None]:
    with one_grader():
        yield


@pytest.fixture
def drawn() -> None:
    """For a test that draws the plots of its report."""


@pytest.fixture(autouse=True)
def _plots_are_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's plots take most of a tiny run's time: only tests with `drawn` draw them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", _empty)


def _empty(_: Figure, file: BinaryIO, **options: Any) -> None:
    assert options["format"] == "svg"
    file.write(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
