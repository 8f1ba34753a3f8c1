"""Small models, and the pair of processes that these tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import devices
from tests.helpers.pair import Pair
from tests.helpers.tiny import make_model, make_tokenizer

if not devices.ON_CPU:
    collect_ignore_glob = ["test_*.py"]  # two ranks on CPUs, compared with one on a CPU


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    ranks = Pair()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tied, untied, and a wider teacher with a padded vocabulary; 261 rows do not divide by 2."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "tied": make_model(),
        "untied": make_model(tied=False),
        "teacher": make_model(vocab_size=270, hidden_size=48),
    }
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|end|>"
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, as on the ranks, so that sums have the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
