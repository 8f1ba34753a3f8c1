"""One timed call of a contender, forward and backward."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.losses.contenders import Contender
from benchmarks.losses.inputs import Inputs


def call(contender: Contender, x: Inputs) -> tuple[float, float, Tensor]:
    """(seconds forward, seconds backward, loss); the gradients are left in x."""
    x.clear()
    _synchronize(x)
    start = time.perf_counter()
    if contender.role == "floor":
        with torch.no_grad():
            loss, backward = x.upstream, contender.call(x)
    else:
        loss = contender.call(x)
        backward = loss.backward
    _synchronize(x)
    middle = time.perf_counter()
    with torch.set_grad_enabled(contender.role != "floor"):
        backward()
    _synchronize(x)
    return middle - start, time.perf_counter() - middle, loss.detach()


def _synchronize(x: Inputs) -> None:
    if x.student.device.type == "cuda":
        torch.cuda.synchronize()
