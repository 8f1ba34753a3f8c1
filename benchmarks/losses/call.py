"""One timed call of a contender, forward and backward."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.losses.contenders import Contender
from benchmarks.losses.inputs import Inputs


def call(contender: Contender, x: Inputs) -> tuple[float, float, Tensor]:
    """(seconds forward, seconds backward, loss); gradients, if any, are left in x."""
    x.clear()
    _synchronize(x)
    start = time.perf_counter()
    floor = contender.role == "floor"
    with torch.set_grad_enabled(x.case.differentiated and not floor):
        found = contender.call(x)
    _synchronize(x)
    middle = time.perf_counter()
    loss, backward = (x.upstream, found) if floor else (found, found.backward)
    if not x.case.differentiated:
        return middle - start, 0.0, loss
    with torch.set_grad_enabled(not floor):
        backward()
    _synchronize(x)
    return middle - start, time.perf_counter() - middle, loss.detach()


def _synchronize(x: Inputs) -> None:
    if x.student.device.type == "cuda":
        torch.cuda.synchronize()
