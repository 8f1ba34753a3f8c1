"""The commands of README and docs are parsed, and their recipes accepted, as the program does."""

import re
import shlex

import pytest

from opsd_train.cli import TRAINING, _config, _parse
from opsd_train.config.errors import UserError
from opsd_train.data.batches import refuse_more_ranks_than_samples
from opsd_train.methods import METHODS
from tests.benchmarks.test_readme_pages import PAGES, text_of

COMMAND = re.compile(
    r"^(?:torchrun --nproc_per_node (\d+)|python) -m opsd_train(.*)$", re.MULTILINE
)


def commands(text: str) -> list[tuple[int, list[str]]]:
    """The processes and the words of every command in a fenced block."""
    blocks = "\n".join(re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    found = COMMAND.findall(re.sub(r"\\\n\s*", "", blocks))
    return [(int(processes or 1), shlex.split(words, comments=True)) for processes, words in found]


def accept(processes: int, words: list[str]) -> None:
    """Raises UserError where the program refuses the command for what its words say."""
    name, options = _parse(words)
    if name != TRAINING or options.help or TRAINING in options.words:
        return
    config = _config(options.words)[1]
    on_solutions = METHODS[config.method].source(config) == "solution"
    count = 1 if on_solutions else config.rollout.samples_per_prompt
    ranks = max(processes, options.ranks or 1)
    refuse_more_ranks_than_samples(config.problems_per_step, count, ranks)


def test_most_pages_that_run_have_commands() -> None:
    assert len(commands(text_of("README.md"))) >= 7
    assert sum(bool(commands(text_of(page))) for page in PAGES) >= 5


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page: str) -> None:
    for processes, words in commands(text_of(page)):
        accept(processes, words)


def test_too_many_ranks_are_not_accepted() -> None:
    with pytest.raises(UserError, match="gives 32 samples, fewer than the 64"):
        accept(1, shlex.split("paper/opsd-qwen3-8b --dry-run --ranks 64 --device h100"))
    with pytest.raises(UserError, match="learning_rate"):
        accept(1, ["demo/opsd", "optim.learning_rate=1"])
