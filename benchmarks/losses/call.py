"""Timed calls of a contender, forward and backward.

On a GPU several calls are queued one after another and timed by CUDA events: the device works while
the host prepares the next call, as in training. If preparing a call takes longer than the call, the
times show that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.losses.contenders import Contender
from benchmarks.losses.inputs import Inputs

# Calls queued one after another on a GPU; the first is not counted.
_IN_A_ROW = 4

Mark = TypeVar("Mark")


def call(contender: Contender, x: Inputs) -> tuple[float, float, Tensor]:
    """(seconds forward, seconds backward, loss) of one call; its gradients are left in x."""
    if x.student.device.type == "cuda":
        *marks, loss = _halves(contender, x, _event)
        torch.cuda.synchronize()
        return *_seconds(*marks), loss
    first, middle, last, loss = _halves(contender, x, time.perf_counter)
    return middle - first, last - middle if x.case.differentiated else 0.0, loss


def samples(contender: Contender, x: Inputs) -> list[tuple[float, float]]:
    """Seconds forward and backward of one call, or on a GPU of several calls."""
    if x.student.device.type != "cuda":
        return [call(contender, x)[:2]]
    found = [_halves(contender, x, _event)[:3] for _ in range(_IN_A_ROW)]
    torch.cuda.synchronize()
    return [_seconds(*marks) for marks in found[1:]]


def _halves(
    contender: Contender, x: Inputs, mark: Callable[[], Mark]
) -> tuple[Mark, Mark, Mark, Tensor]:
    """Time marks before forward, between forward and backward, and after backward; the loss."""
    x.clear()
    floor = contender.role == "floor"
    first = mark()
    with torch.set_grad_enabled(x.case.differentiated and not floor):
        found = contender.call(x)
    middle = mark()
    loss, backward = (x.upstream, found) if floor else (found, found.backward)
    if x.case.differentiated:
        with torch.set_grad_enabled(not floor):
            backward()
    return first, middle, mark(), loss.detach()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(
    first: torch.cuda.Event, middle: torch.cuda.Event, last: torch.cuda.Event
) -> tuple[float, float]:
    return first.elapsed_time(middle) / 1000, middle.elapsed_time(last) / 1000
