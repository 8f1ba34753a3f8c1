"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from opsd_train.config.schema import OptimConfig


def make_schedule(optimizer: Optimizer, config: OptimConfig, steps: int, updates: int) -> LambdaLR:
    """The schedule over `steps` steps of `updates` optimizer steps each; call step() after each."""
    factor = rate_factor(config, steps * updates, config.warmup_steps * updates)
    return LambdaLR(optimizer, lambda done: factor(done + 1))


def rate_factor(config: OptimConfig, last: int, warmup: int) -> Callable[[int], float]:
    """Share of optim.lr that optimizer step n takes, n from 1 to `last`.

    n / warmup during the warm-up, so that no step is lost at rate 0 and step `warmup` takes all of
    it. From there p = (n - warmup) / (last - warmup + 1) goes towards 1, which only the step after
    the last would reach: 1 - p for "linear", (1 + cos(pi p)) / 2 for "cosine". Without a warm-up
    these are transformers' schedules of the same names.
    """
    peak = max(warmup, 1)  # the first step at the whole rate

    def factor(n: int) -> float:
        if n < peak:
            return n / peak
        part = min((n - peak) / (last - peak + 1), 1.0)
        if config.schedule == "linear":
            return 1 - part
        return (1 + math.cos(math.pi * part)) / 2 if config.schedule == "cosine" else 1.0

    return factor
