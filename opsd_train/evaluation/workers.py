"""Applies a function to many items in processes that may hang or die: only the item at fault fails.

concurrent.futures cannot end one stuck process, and a process that dies breaks its whole pool.
pebble 5.2 can, but from a fork server its processes run the main module again, and one that is
killed while idle breaks the pool (BrokenProcessPool: "All workers expired").
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_FEWEST_PER_PROCESS = 8  # with fewer, one more process does not pay: it imports for 1 to 2 s
_ADDRESS_SPACE = 4 * 2**30  # bytes: 9^9^9^9 ends in a MemoryError, not in swapping
_READY = "ready"
# Not multiprocessing's spawn: it runs the parent's main module again, so a training script without
# `if __name__ == "__main__"` would train in every process, and one with it would import torch.
_START = (
    "import signal, sys;"
    "signal.signal(signal.SIGINT, signal.SIG_IGN);"  # the parent handles both, and ends this
    "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "sys.path[:] = sys.argv[2:];"
    "from opsd_train.evaluation.workers import serve;"
    "serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Failure:
    """The result of an item that has none."""

    reason: str
    """"timeout", or "error: ..."."""


class Crew:
    """A pool of up to `workers` processes that apply one function to items in the background.

    `function` is pickled by name; each process imports `modules` before its first item. An item
    may take `seconds` of wall-clock time: its process is then killed and replaced. Processes are
    started as items come, and stay until `close`.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        seconds: float,
        workers: int,
        modules: Sequence[str] = (),
    ) -> None:
        self._order = (function, seconds, tuple(modules))
        self._seconds, self._most = seconds, workers
        self._waiting: deque[tuple[Any, Future[Any]]] = deque()
        self._lock = threading.Lock()  # held to start or end the thread, and to add items
        self._thread: threading.Thread | None = None
        self._bell, self._ring = multiprocessing.Pipe(duplex=False)
        self._closing = False

    def submit(self, items: Sequence[Any]) -> list[Future[Any]]:
        """A future for each item: function(item), or a Failure if that raised, died or took too
        long. All futures raise RuntimeError if a process dies before its first item."""
        futures: list[Future[Any]] = [Future() for _ in items]
        with self._lock:
            self._waiting.extend(zip(items, futures, strict=True))
            if self._thread is None and items:
                self._closing = False
                # A daemon, so that a crew that is never closed does not keep Python from ending.
                self._thread = threading.Thread(target=self._supervise, daemon=True)
                self._thread.start()
            self._ring.send(None)
        return futures

    def close(self) -> None:
        """Kill the processes; futures of unfinished items raise RuntimeError."""
        with self._lock:
            thread, self._closing = self._thread, True
            self._ring.send(None)
        if thread is not None:
            thread.join()

    def _supervise(self) -> None:
        crew: list[_Worker] = []
        error: BaseException = RuntimeError("the grading processes were closed")
        try:
            while not self._closing:
                self._share_out(crew)
                nearest = min((worker.deadline for worker in crew), default=math.inf)
                pause = None if nearest == math.inf else max(0.0, nearest - time.monotonic())
                ready = wait([self._bell, *(worker.connection for worker in crew)], pause)
                if self._bell in ready:
                    self._bell.recv()
                for worker in list(crew):
                    if not worker.goes_on():
                        crew.remove(worker)
                        worker.kill()
        except BaseException as raised:
            error = raised
        finally:
            for worker in crew:
                worker.kill()
            with self._lock:
                self._thread = None
                left = [worker.future for worker in crew if worker.future is not None]
                left += [future for _, future in self._waiting]
                self._waiting.clear()
            for future in left:
                future.set_exception(error)

    def _share_out(self, crew: list[_Worker]) -> None:
        wanted = min(self._most, math.ceil(len(self._waiting) / _FEWEST_PER_PROCESS))
        while len(crew) < wanted:
            crew.append(_Worker(self._order, self._seconds))
        for worker in crew:
            if worker.ready and worker.future is None and self._waiting:
                worker.give(*self._waiting.popleft())


class _Worker:
    """One process, and the item it works on."""

    def __init__(self, order: tuple[Any, ...], seconds: float) -> None:
        self.connection, other = multiprocessing.Pipe()
        with other:  # closed here, so that the connection ends when the process dies
            # One thread each: several processes share the cores with a trainer.
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(other.fileno()), *sys.path],
                pass_fds=[other.fileno()],
                env=os.environ | threads,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # some scorers print
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        self._seconds, self.ready, self.deadline = seconds, False, math.inf
        self.future: Future[Any] | None = None
        self._send(order)

    def give(self, item: Any, future: Future[Any]) -> None:
        """Send the next item, and start its clock."""
        self.future, self.deadline = future, time.monotonic() + self._seconds
        self._send(item)

    def goes_on(self) -> bool:
        """Take a result, if there is one; False if the process is dead or must be killed.

        Raises RuntimeError if it died before it was ready for items.
        """
        try:
            if self.connection.poll():
                message = self.connection.recv()
                if self.ready:
                    self._finish(message)
                self.ready = True
        except (EOFError, OSError):  # the process is dead, maybe in the middle of a message
            how = f"process ended with exit code {self.process.wait()}"
            if self.future is None:
                if self.ready:  # it died while idle: no item is lost
                    return False
                raise RuntimeError(f"a grading {how} before it had anything to do") from None
            self._finish(Failure(f"error: {how}"))
            return False
        if time.monotonic() > self.deadline:
            self._finish(Failure("timeout"))
            return False
        return True

    def kill(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # goes_on() sees it too
            self.connection.send(message)

    def _finish(self, result: Any) -> None:
        assert self.future is not None
        future, self.future, self.deadline = self.future, None, math.inf
        future.set_result(result)


def serve(descriptor: int) -> None:
    """Main function of a worker process: items in, results out, over an inherited descriptor."""
    connection = Connection(descriptor)
    function, seconds, modules = connection.recv()
    for module in modules:
        importlib.import_module(module)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send(_READY)
    while True:
        try:
            item = connection.recv()
        except EOFError:  # the parent is gone
            return
        _limit_cpu(seconds)
        connection.send(_attempt(function, item))


def _limit_cpu(seconds: float) -> None:
    """The kernel ends an item that hangs after the parent, which watches the clock, has died."""
    most = math.ceil(time.process_time() + 2 * seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _attempt(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:  # whatever it is, only this item fails
        return Failure(f"error: {type(error).__name__}: {error}"[:200])
