"""A function over many items, in processes that may hang or die: only the item at fault is lost.

concurrent.futures cannot end one stuck process, and a process that dies breaks its whole pool.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# Started anew rather than forked: the parent may hold torch, its threads and a GPU.
_PROCESSES = multiprocessing.get_context("spawn")
_MOST_PER_MESSAGE = 64
_FEWEST_PER_PROCESS = 8  # below that, starting one more (half a second) does not pay
_ADDRESS_SPACE = 4 * 2**30  # 9^9^9^9 ends in a MemoryError, not in the machine's swap
_READY = "ready"


@dataclass(frozen=True)
class Failure:
    """What became of an item without a result: "timeout", or "error: ..."."""

    reason: str


def run_each(
    function: Callable[[Any], Any], items: Sequence[Any], seconds: float, workers: int
) -> list[Any]:
    """function(item) of each item, in order; a Failure where it raised, died or took too long.

    `function` is one that pickle finds by name. `seconds` bounds each item by the clock on the
    wall; a process that exceeds it is killed and replaced, and what it had not begun is done by
    another. RuntimeError if a process dies before it is given anything to do.
    """
    results: list[Any] = [None] * len(items)
    waiting = deque(range(len(items)))
    crew: list[_Worker] = []
    try:
        while waiting or any(worker.todo for worker in crew):
            while len(crew) < min(workers, math.ceil(len(waiting) / _FEWEST_PER_PROCESS)):
                crew.append(_Worker(function, seconds))
            share = math.ceil(len(waiting) / (2 * len(crew)))
            for worker in crew:
                if worker.ready and not worker.todo and waiting:
                    count = min(share, _MOST_PER_MESSAGE, len(waiting))
                    worker.give([waiting.popleft() for _ in range(count)], items)
            nearest = min(worker.deadline for worker in crew) - time.monotonic()
            wait(
                [worker.connection for worker in crew],
                timeout=None if nearest == math.inf else max(0.0, nearest),
            )
            for worker in list(crew):
                reason = worker.collect(results)
                if reason is not None:
                    results[worker.todo.popleft()] = Failure(reason)
                    waiting.extend(worker.todo)
                    crew.remove(worker)
                    worker.kill()
    finally:
        for worker in crew:
            worker.kill()
    return results


class _Worker:
    """One process and the items it was given; the first of them is the one it works at."""

    def __init__(self, function: Callable[[Any], Any], seconds: float) -> None:
        self.connection, other = _PROCESSES.Pipe()
        self.process = _PROCESSES.Process(target=_serve, args=(function, other), daemon=True)
        self.process.start()
        other.close()  # so that the process's death is an end of file here
        self.seconds, self.ready, self.deadline = seconds, False, math.inf
        self.todo: deque[int] = deque()

    def give(self, indices: list[int], items: Sequence[Any]) -> None:
        self.todo.extend(indices)
        self.deadline = time.monotonic() + self.seconds
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # collect() sees it too
            self.connection.send([items[index] for index in indices])

    def collect(self, results: list[Any]) -> str | None:
        """Takes the results that are there; why the process has to go, if it has to."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if self.ready:
                    results[self.todo.popleft()] = message
                    self.deadline = time.monotonic() + self.seconds if self.todo else math.inf
                self.ready = True
        except (EOFError, OSError):  # also in the middle of a message
            self.process.join()
            how = f"process ended with exit code {self.process.exitcode}"
            if not self.todo:
                raise RuntimeError(f"a grading {how} before it had anything to do") from None
            return f"error: {how}"
        return "timeout" if time.monotonic() > self.deadline else None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """The life of a process: lists of items in, one result after the other out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then kills this
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    connection.send(_READY)
    while True:
        try:
            items = connection.recv()
        except EOFError:  # the parent is gone
            return
        for item in items:
            connection.send(_attempt(function, item))


def _attempt(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:  # whatever it is, it costs this item only, and is told
        return Failure(f"error: {type(error).__name__}: {error}"[:200])
