"""Two processes connected by gloo, started once, that run one test function after another."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from opsd_train.distributed.context import DistributedContext, init_distributed
from tests.helpers import devices
from tests.helpers.forked import forking

SIZE = 2
PATIENCE = 120  # seconds until a rank that gives no result counts as hung
GRACE = 3  # seconds for the other rank once one has failed: it may wait for it for ever
START = 300  # seconds for both to start, on a busy machine


class Pair:
    """`run` calls a function on both ranks. The processes are kept until a call fails."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(context, *args)` on both ranks: their results, in rank order."""
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, args))
        results = self._receive(PATIENCE)
        errors = [text for failed, text in results if failed]
        if errors:
            self.stop()
            raise AssertionError("\n".join(errors))
        return [result for _, result in results]

    def stop(self) -> None:
        """End both processes."""
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context = forking()
        port = _free_port()
        for rank in range(SIZE):
            pipe, other = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, other), daemon=True)
            process.start()
            self._ranks.append((process, pipe))
            other.close()  # so that a rank that dies closes the pipe
        self._receive(START)

    def _receive(self, patience: float) -> list[tuple[bool, Any]]:
        results: dict[Connection, tuple[bool, Any]] = {}
        pipes = [pipe for _, pipe in self._ranks]
        while len(results) < SIZE:
            failed = any(failed for failed, _ in results.values())
            waiting = [pipe for pipe in pipes if pipe not in results]
            ready = wait(waiting, GRACE if failed else patience)
            results |= {pipe: _result(pipe) for pipe in ready}
            if not ready:
                results |= {pipe: (True, "a rank hangs") for pipe in waiting}
        return [results[pipe] for pipe in pipes]


def _result(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return True, "a rank died"


def alone() -> DistributedContext:
    """The context of the single process that the two are compared with."""
    return DistributedContext(torch.device(devices.NAME))


def _serve(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = init_distributed("cpu")
    pipe.send((False, "ready"))
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((False, function(context, *args)))
        except Exception:
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
