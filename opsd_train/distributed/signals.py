"""Ctrl-C and SIGTERM: finish the step, save, leave."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SAME_REQUEST = 1.0  # seconds


@dataclass
class StopRequest:
    """The first SIGINT or SIGTERM that came, None as long as there is none."""

    signal: int | None = None
    since: float = 0.0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler: a second signal interrupts at once."""
        if self.signal is not None:
            # torchrun passes on a Ctrl-C that the terminal has sent to every process already.
            if time.monotonic() - self.since > _SAME_REQUEST:
                raise KeyboardInterrupt
            return
        self.signal, self.since = number, time.monotonic()
        print("stopping after this step; once more to stop at once", file=sys.stderr)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While entered, signals only make a note."""
    request = StopRequest()
    before = {s: signal.signal(s, request.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
