"""Phases of a step: their time with what a GPU has still to do, and the one that an error left."""

import time

import pytest
import torch

from opsd_train.reporting.timers import PhaseTimer


class Queue:
    """A GPU's stream: what is launched takes its time when somebody waits for it."""

    def __init__(self) -> None:
        self.left = 0.0

    def launch(self, seconds: float) -> None:
        self.left += seconds

    def synchronize(self) -> None:
        time.sleep(self.left)
        self.left = 0.0


@pytest.fixture
def queue(monkeypatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made)
    return made


def test_a_phase_has_the_work_that_it_launched(queue: Queue) -> None:
    timer = PhaseTimer()
    queue.launch(0.3)  # of what came before
    with timer.phase("teacher"):
        queue.launch(0.1)
    with timer.phase("student"):
        queue.launch(0.2)
    assert 0.1 <= timer.seconds["teacher"] < 0.3 and 0.2 <= timer.seconds["student"] < 0.4


def test_without_a_gpu_nothing_is_waited_for(queue: Queue, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with PhaseTimer().phase("teacher"):
        queue.launch(1.0)
    assert queue.left == 1.0


def test_the_phase_that_an_error_left() -> None:
    timer = PhaseTimer()
    with timer.phase("rollout"):
        pass
    assert timer.failed is None
    with pytest.raises(ValueError), timer.phase("student"), timer.phase("grading"):
        raise ValueError
    assert timer.failed == "grading" and set(timer.seconds) == {"rollout", "student", "grading"}
