"""The tiny model and one short run of it, with LoRA and with all weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from opsd_train.config.load import config_from
from opsd_train.run import train
from tests.helpers.tiny import recipe, save_model
from tests.helpers.verdicts import one_grader


@pytest.fixture(scope="session", autouse=True)
def shared_grader() -> Iterator[None]:
    with one_grader():
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", params=["lora", "full"])
def run_folder(request, tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    wanted = recipe(model_folder, folder)
    wanted["optim"]["lr"] = 0.1  # so that what was trained says something else
    if request.param == "full":
        wanted["lora"] = None
    assert train(config_from(wanted)) == 0
    return folder
