"""Processes that hang, die or run out of memory, and what the other items lose: nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from opsd_train.evaluation.workers import Crew, Failure
from tests.helpers.misbehaving import behave, doze
from tests.helpers.verdicts import children, wait_until_gone


def run_each(
    function: Callable[[Any], Any], items: Sequence[Any], seconds: float, workers: int
) -> list[Any]:
    """function(item) of each item, in order, in a crew for them alone."""
    crew = Crew(function, seconds, workers)
    try:
        return [future.result() for future in crew.submit(items)]
    finally:
        crew.close()


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


# ------------------------------------------------------------------------------------------ a crew


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(behave, 60, 1)
    yield made
    made.close()


def test_a_crew_works_in_the_background_and_stays(crew: Crew) -> None:
    start = time.monotonic()
    (first,) = crew.submit(["process"])
    assert time.monotonic() - start < 0.5  # its process takes longer to start
    (second,) = crew.submit(["process"])
    assert not first.done() or first.result() == second.result()
    process = first.result()
    assert process == second.result() == crew.submit(["process"])[0].result() != os.getpid()
    crew.close()
    crew.close()
    with pytest.raises(ProcessLookupError):  # neither running nor a zombie
        os.kill(process, 0)
    assert crew.submit(["again"])[0].result() == "again"


def test_what_is_pending_at_the_end_fails(crew: Crew) -> None:
    crew.submit(["process"])[0].result()
    futures = crew.submit(["hang", 1, 2])
    crew.close()
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result()


def test_an_idle_process_that_is_killed_is_replaced(crew: Crew) -> None:
    (process,) = (future.result() for future in crew.submit(["process"]))
    os.kill(process, signal.SIGKILL)
    while process in children(os.getpid()):
        time.sleep(0.01)
    (other,) = (future.result() for future in crew.submit(["process"]))
    assert other != process


def test_signals_to_all_processes_end_no_check(crew: Crew) -> None:
    """As the terminal's Ctrl-C, or the SIGTERM of a batch system: the run finishes its step."""
    (process,) = (future.result() for future in crew.submit(["process"]))
    (doing,) = crew.submit([("doze", 0.5)])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process, number)
    assert doing.result() == ("doze", 0.5)


SCRIPT = """
import sys
from opsd_train.evaluation.workers import Crew
from tests.helpers.misbehaving import behave
print("main runs", flush=True)
crew = Crew(behave, 1, 1)
print(crew.submit(["process"])[0].result(), flush=True)
crew.submit([sys.argv[1]])
if sys.argv[1] == "spin":
    import time
    time.sleep(1000)
"""


def script(tmp_path: Path, what: str) -> subprocess.Popen:
    """A program without `if __name__ == "__main__"`, with its crew at work."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(path), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_the_main_program_is_not_run_again(tmp_path: Path) -> None:
    """And a crew that is never closed ends with it."""
    running = script(tmp_path, "nothing more")
    assert running.stdout.readline() == "main runs\n"
    process = int(running.stdout.readline())
    assert running.stdout.read() == "" and running.wait() == 0
    wait_until_gone(process)


def test_a_killed_program_leaves_no_process(tmp_path: Path) -> None:
    """Not even one that a single call keeps busy for ever."""
    running = script(tmp_path, "spin")
    running.stdout.readline()
    process = int(running.stdout.readline())
    running.kill()
    running.wait()
    wait_until_gone(process)
