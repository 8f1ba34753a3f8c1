"""Grading in tests: made-up verdicts without processes, or one grader shared by all runs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from opsd_train.evaluation.grading import Answer, Grade, Grader


class Verdicts:
    """Replaces a Grader: `right` decides at once whether an answer is correct."""

    def __init__(self, right: Callable[[Answer], bool]) -> None:
        self.right = right

    def submit(self, answers: Sequence[Answer]) -> Any:
        grades = [Grade(self.right(answer), answer.text, False) for answer in answers]
        return SimpleNamespace(result=lambda: grades)

    def close(self) -> None:
        """No processes to end."""


def made_up(right: Callable[[Answer], bool] = lambda _: False) -> Any:
    """Within this context trainers grade with `right` instead of a Grader."""
    return mock.patch("opsd_train.trainer.Grader", lambda **_: Verdicts(right))


@contextmanager
def one_grader() -> Iterator[None]:
    """Within this context all trainers share one real grader: its process takes long to start."""
    shared = Grader(workers=1)
    with (
        mock.patch.object(shared, "close"),
        mock.patch("opsd_train.trainer.Grader", lambda **_: shared),
    ):
        yield
    shared.close()


def children(process: int) -> set[int]:
    """Ids of the child processes of `process`."""
    found: set[int] = set()
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update(map(int, (thread / "children").read_text().split()))
    return found


def wait_until_gone(process: int) -> None:
    end = time.monotonic() + 60
    while _alive(process):
        assert time.monotonic() < end, f"process {process} is still there"
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie has ended: in a container there may be no process to reap it
