"""One timed call of a contender, forward and backward.

On a GPU it is the second of two calls in a row, between CUDA events: the device works through the
first while the host prepares the second, as in training, where the host runs ahead. Who cannot
prepare a call in the time of a call shows that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.losses.contenders import Contender
from benchmarks.losses.inputs import Inputs

Mark = TypeVar("Mark")


def call(contender: Contender, x: Inputs) -> tuple[float, float, Tensor]:
    """(seconds forward, seconds backward, loss); gradients, if any, are left in x."""
    if x.student.device.type == "cuda":
        _halves(contender, x, _event)
        first, middle, last, loss = _halves(contender, x, _event)
        torch.cuda.synchronize()
        forward, backward = first.elapsed_time(middle) / 1000, middle.elapsed_time(last) / 1000
    else:
        first, middle, last, loss = _halves(contender, x, time.perf_counter)
        forward, backward = middle - first, last - middle
    return forward, backward if x.case.differentiated else 0.0, loss


def _halves(
    contender: Contender, x: Inputs, mark: Callable[[], Mark]
) -> tuple[Mark, Mark, Mark, Tensor]:
    """Marks before, between and after the halves of a call, and its loss."""
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
