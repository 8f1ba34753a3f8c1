"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from opsd_train.config.schema import OptimConfig


def make_schedule(optimizer: Optimizer, config: OptimConfig, steps: int, updates: int) -> LambdaLR:
    """The schedule of a run with `steps` steps of `updates` optimizer steps each.

    Call its step() after every optimizer step.
    """
    factor = rate_factor(config, steps * updates, config.warmup_steps * updates)
    return LambdaLR(optimizer, lambda done: factor(done + 1))


def rate_factor(config: OptimConfig, last: int, warmup: int) -> Callable[[int], float]:
    """The factor on optim.lr as a function of the optimizer step n, from 1 to `last`.

    During the warm-up it is n / warmup: no step has rate 0, and step `warmup` has the full rate.
    Then, with peak = max(warmup, 1) and p = (n - peak) / (last - peak + 1), it is 1 for "constant",
    1 - p for "linear" and (1 + cos(pi p)) / 2 for "cosine": rate 0 would come one step after the
    last. Without a warm-up these are transformers' schedules of the same names.
    """
    peak = max(warmup, 1)  # the first step with the full rate

    def factor(n: int) -> float:
        if n < peak:
            return n / peak
        progress = min((n - peak) / (last - peak + 1), 1.0)
        if config.schedule == "linear":
            return 1 - progress
        return (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1.0

    return factor
