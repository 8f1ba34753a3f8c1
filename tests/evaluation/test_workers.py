"""Processes that hang, die or run out of memory, and what the other items lose: nothing."""

import os
import signal
import sys
import time

import pytest

from opsd_train.evaluation.workers import Failure, run_each


def behave(what: object) -> object:
    """Runs in the other process: does what it is told."""
    if what == "hang":
        time.sleep(1000)
    elif what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        os._exit(3)
    elif what == "raise":
        raise KeyError("numbers")
    elif what == "recurse":
        return behave_deeper(0)
    elif what == "eat":
        return len(bytearray(8 * 2**30))
    elif what == "modules":
        return "torch" in sys.modules
    elif what == "process":
        return os.getpid()
    return what


def behave_deeper(depth: int) -> int:
    return behave_deeper(depth + 1) + 1


def test_only_the_item_at_fault_is_lost() -> None:
    items: list[object] = list(range(200))
    items[0], items[7], items[8], items[100] = "hang", "die", "hang", "exit"
    items[120], items[150], items[199] = "raise", "recurse", "eat"
    expected = list(items)
    expected[0] = expected[8] = Failure("timeout")
    expected[7] = Failure("error: process ended with exit code -11")
    expected[100] = Failure("error: process ended with exit code 3")
    expected[120] = Failure("error: KeyError: 'numbers'")
    expected[150] = Failure("error: RecursionError: maximum recursion depth exceeded")
    expected[199] = Failure("error: MemoryError: ")
    assert run_each(behave, items, 0.5, 2) == expected


def test_time_is_that_of_each_item_not_of_a_chunk() -> None:
    """40 items of 50 ms in one message take longer than the limit of 1 s for each."""
    assert run_each(doze, [0.05] * 40, 1.0, 1) == [0.05] * 40


def doze(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_worker_has_no_torch_though_the_parent_has() -> None:
    assert "torch" in sys.modules
    assert run_each(behave, ["modules"], 10, 1) == [False]


def test_processes_are_shared_and_gone_afterwards() -> None:
    processes = run_each(behave, ["process"] * 1000, 10, 2)
    assert 1 <= len(set(processes)) <= 2
    for process in set(processes):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_no_items_no_processes() -> None:
    assert run_each(behave, [], 1.0, 2) == []


class Fussy:
    """A function that the other process cannot even load."""

    def __call__(self, item: object) -> object:
        return item

    def __reduce__(self):
        return os._exit, (5,)


def test_a_process_that_cannot_start_is_no_answers_fault() -> None:
    with pytest.raises(RuntimeError, match="exit code 5 before it had anything to do"):
        run_each(Fussy(), [1], 1.0, 1)
