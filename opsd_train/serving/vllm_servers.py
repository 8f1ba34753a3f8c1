"""Requests spread over several vLLM servers; those of a server that is gone go to the others."""

from __future__ import annotations

import resource
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

from opsd_train.config.errors import UserError
from opsd_train.serving.vllm_client import PATIENCE, ServerLost, VllmServer

IN_FLIGHT = 256  # requests of one process at a server: vLLM decodes so many at once on most GPUs

Item = TypeVar("Item")
Result = TypeVar("Result")


class VllmServers:
    """The servers of a run. One that is lost gets no requests until its `lost` is None again.

    `say` prints a line, once for each loss. While requests are in flight every server is asked each
    `interval` seconds whether it is well; one that does not say so within `patience` seconds is
    lost.
    """

    def __init__(
        self,
        urls: Sequence[str],
        say: Callable[[str], None],
        *,
        interval: float = 1.0,
        patience: float = PATIENCE,
    ) -> None:
        self.all = [VllmServer(url) for url in urls]
        self._say, self._interval, self._patience = say, interval, patience
        self._said: dict[VllmServer, str] = {}  # of the lost ones, why
        self._room = _room(len(urls))

    @property
    def live(self) -> list[VllmServer]:
        """The servers that are not lost."""
        return [server for server in self.all if server.lost is None]

    def spread(
        self, items: Sequence[Item], ask: Callable[[VllmServer, Item], Result]
    ) -> list[Result]:
        """`ask(server, item)` for each item, on any server; the results in the items' order.

        Neighbours go to one server, where they may share a cached prompt. The items of a server
        that is lost go to the others. Raises UserError if none is left, and what else `ask` raises.
        """
        results: dict[int, Result] = {}
        waiting = deque(range(len(items)))
        running, moved = Counter[VllmServer](), Counter[VllmServer]()
        futures: list[Future] = []
        ended: SimpleQueue[tuple[VllmServer, int, Any]] = SimpleQueue()

        def work(server: VllmServer, index: int) -> None:
            outcome: Any
            try:
                outcome = ask(server, items[index])
            except Exception as error:
                outcome = error
            ended.put((server, index, outcome))

        with self._watched(), ThreadPoolExecutor(self._room * len(self.all)) as pool:
            try:
                while len(results) < len(items):
                    for server, index in self._assign(waiting, running):
                        futures.append(pool.submit(work, server, index))
                    server, index, outcome = ended.get()
                    running[server] -= 1
                    if isinstance(outcome, ServerLost):
                        server.lose(str(outcome))
                        waiting.appendleft(index)
                        moved[server] += 1
                        if not running[server]:
                            self.report(server, moved[server])
                    elif isinstance(outcome, Exception):
                        raise outcome
                    else:
                        results[index] = outcome
            finally:
                self._end(futures)
        for server in self.all:
            self.report(server, 0)
        return [results[index] for index in range(len(items))]

    def each(self, ask: Callable[[VllmServer], Result]) -> dict[VllmServer, Result]:
        """`ask(server)` on all live servers at once; the results of those that are not lost by it.

        Raises UserError if none is left, and what else `ask` raises.
        """
        results: dict[VllmServer, Result] = {}

        def work(server: VllmServer) -> None:
            try:
                results[server] = ask(server)
            except ServerLost as error:
                server.lose(str(error))

        with self._watched(), ThreadPoolExecutor(len(self.all)) as pool:
            list(pool.map(work, self.live))  # raises what one of them raised
        for server in self.all:
            self.report(server, 0)
        self.refuse_none()
        return {server: result for server, result in results.items() if server.lost is None}

    def report(self, server: VllmServer, moved: int) -> None:
        """If the server is lost, say so once, and how many requests have `moved` to the others."""
        if server.lost is not None and server.lost != self._said.get(server) and self.live:
            self._said[server] = server.lost
            requests = f"its {moved} requests go" if moved != 1 else "its 1 request goes"
            tail = f"; {requests} to the others" if moved else ""
            self._say(f"{server.url} is gone: {server.lost}{tail}")

    def report_back(self, server: VllmServer) -> None:
        """If the server was said to be lost and is not, say so."""
        if server.lost is None and self._said.pop(server, ""):
            self._say(f"{server.url} is back")

    def refuse_none(self) -> None:
        """Raises UserError if no server is left."""
        if not self.live:
            reasons = ", ".join(f"{server.url}: {server.lost}" for server in self.all)
            raise UserError(
                f"no vLLM server is left ({reasons}); the last checkpoint is kept: start them "
                "again and continue with --resume"
            )

    def _assign(
        self, waiting: deque[int], running: Counter[VllmServer]
    ) -> Iterator[tuple[VllmServer, int]]:
        """Takes items off `waiting`: an equal share for each server, as far as it has room."""
        if waiting:
            self.refuse_none()
        servers = sorted(self.live, key=lambda server: running[server])
        for rank, server in enumerate(servers):
            share = -(-len(waiting) // (len(servers) - rank))
            for _ in range(min(share, self._room - running[server])):
                running[server] += 1
                yield server, waiting.popleft()

    def end(self) -> None:
        """Ask no server any more: requests in flight end, and their calls raise UserError."""
        for server in self.all:  # all first: no request may move to another server
            server.lost = server.lost or "the run has ended"
        for server in self.all:
            server.abort()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Within this context a server that hangs is lost."""
        over = Event()

        def watch(server: VllmServer) -> None:
            while not over.wait(self._interval) and server.lost is None:
                try:
                    server.check_health(self._patience)
                except (ServerLost, UserError) as error:
                    if not over.is_set():
                        server.lose(str(error))

        for server in self.live:
            Thread(target=watch, args=(server,), daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _end(self, futures: Sequence[Future]) -> None:
        """After an error or Ctrl-C: end what is in flight. A request may begin after an abort."""
        while wait(futures, timeout=0).not_done:
            for server in self.all:
                server.abort()
            wait(futures, timeout=0.05)


def _room(servers: int) -> int:
    """Requests of this process at each server: a request has a socket, and so has a check."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return IN_FLIGHT
    return max(1, min(IN_FLIGHT, files // 2 // servers))
