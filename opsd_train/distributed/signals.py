"""Ctrl-C and SIGTERM: the first asks for a stop after the current step, the second interrupts."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_REPEAT_SECONDS = 1.0  # a signal this soon after the first is a copy of it


@dataclass
class StopRequest:
    """The first SIGINT or SIGTERM received; `signal` is None until then."""

    signal: int | None = None
    since: float = 0.0  # time.monotonic() of that signal

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: record the first signal, raise KeyboardInterrupt on a second one."""
        if self.signal is not None:
            # torchrun forwards a Ctrl-C that the terminal has already sent to every process.
            if time.monotonic() - self.since > _REPEAT_SECONDS:
                raise KeyboardInterrupt
            return
        self.signal, self.since = number, time.monotonic()
        print("stopping after this step; signal again to stop at once", file=sys.stderr)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record SIGINT and SIGTERM in the StopRequest it yields; restore the handlers on exit."""
    request = StopRequest()
    before = {s: signal.signal(s, request.handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
