"""A function over many items, in processes that may hang or die: only the item at fault is lost.

concurrent.futures cannot end one stuck process, and a process that dies breaks its whole pool.
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

_FEWEST_PER_PROCESS = 8  # below that, starting one more (1 to 2 s of imports) does not pay
_ADDRESS_SPACE = 4 * 2**30  # 9^9^9^9 ends in a MemoryError, not in the machine's swap
_READY = "ready"
# Not multiprocessing's spawn, which would run the parent's main module again: a script that trains
# without an `if __name__ == "__main__"`, or imports torch, would do so in every process.
_START = (
    "import signal, sys;"
    "signal.signal(signal.SIGINT, signal.SIG_IGN);"  # both are the parent's, which ends this
    "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "sys.path[:] = sys.argv[2:];"
    "from opsd_train.evaluation.workers import serve;"
    "serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Failure:
    """What became of an item without a result: "timeout", or "error: ..."."""

    reason: str


class Crew:
    """Processes that apply one function to items, in the background, until `close`.

    `function` is one that pickle finds by name; each process imports `modules` before its first
    item. `seconds` bounds each item by the clock on the wall; a process that exceeds it is killed
    and replaced. Up to `workers` processes are started, as there is work for them.
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
        self._waiting: deque[tuple[Any, Future]] = deque()
        self._lock = threading.Lock()  # of the thread's start and end, and of what waits for it
        self._thread: threading.Thread | None = None
        self._bell, self._ring = multiprocessing.Pipe(duplex=False)
        self._closing = False

    def submit(self, items: Sequence[Any]) -> list[Future]:
        """A future for each item: of function(item), or a Failure where it raised, died or took
        too long. RuntimeError in all if a process dies before it is given anything to do."""
        futures: list[Future] = [Future() for _ in items]
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
        """Kills the processes; what was not done yet fails with RuntimeError."""
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
    """One process, and the item that it works at."""

    def __init__(self, order: tuple[Any, ...], seconds: float) -> None:
        self.connection, other = multiprocessing.Pipe()
        with other:  # closed here, so that the process's death is an end of file
            # One thread each: there are several processes, beside a trainer.
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
        self.future: Future | None = None
        self._send(order)

    def give(self, item: Any, future: Future) -> None:
        self.future, self.deadline = future, time.monotonic() + self._seconds
        self._send(item)

    def goes_on(self) -> bool:
        """Takes the result that is there; False if the process is gone or has to go."""
        try:
            if self.connection.poll():
                message = self.connection.recv()
                if self.ready:
                    self._finish(message)
                self.ready = True
        except (EOFError, OSError):  # also in the middle of a message
            how = f"process ended with exit code {self.process.wait()}"
            if self.future is None:
                if self.ready:  # killed while it was idle: nothing is lost
                    return False
                raise RuntimeError(f"a grading {how} before it had anything to do") from None
            self._finish(Failure(f"error: {how}"))
            return False
        if time.monotonic() > self.deadline:
            self._finish(Failure("timeout"))
            return False
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # goes_on() sees it too
            self.connection.send(message)

    def _finish(self, result: Any) -> None:
        future, self.future, self.deadline = self.future, None, math.inf
        future.set_result(result)


def run_each(
    function: Callable[[Any], Any], items: Sequence[Any], seconds: float, workers: int
) -> list[Any]:
    """function(item) of each item, in order; see Crew."""
    crew = Crew(function, seconds, workers)
    try:
        return [future.result() for future in crew.submit(items)]
    finally:
        crew.close()


def serve(descriptor: int) -> None:
    """The life of a process: one item in, one result out, over the socket that it inherited."""
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
    """The end of an item that hangs after its parent, which watches the clock, was killed."""
    most = math.ceil(time.process_time() + 2 * seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _attempt(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:  # whatever it is, it costs this item only, and is told
        return Failure(f"error: {type(error).__name__}: {error}"[:200])
