"""The learning rate of every step is the documented one."""

import math

import pytest
import torch
from transformers import get_scheduler

from opsd_train.config.schema import OptimConfig
from opsd_train.learning_rate import make_schedule

STEPS = 8
NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def rates(schedule: str, warmup: int, updates: int = 1) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    config = OptimConfig(lr=0.5, warmup_steps=warmup, schedule=schedule)
    return walk(optimizer, make_schedule(optimizer, config, STEPS, updates), STEPS * updates)


def walk(optimizer, scheduler, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warm_up_it_is_that_of_transformers(schedule, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = walk(optimizer, get_scheduler(NAMES[schedule], optimizer, 0, STEPS), STEPS)
    assert rates(schedule, warmup) == pytest.approx(theirs, abs=1e-15)


def test_warm_up_and_end():
    assert rates("constant", 4) == [0.125, 0.25, 0.375] + [0.5] * 5
    assert rates("linear", 4) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.4, 0.3, 0.2, 0.1])
    cosine = [0.25 * (1 + math.cos(math.pi * n / 5)) for n in range(5)]
    assert rates("cosine", 4) == pytest.approx([0.125, 0.25, 0.375, *cosine])


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("warmup", range(STEPS + 1))
def test_no_step_is_lost(schedule, warmup):
    found = rates(schedule, warmup)
    assert min(found) > 0 and max(found) == 0.5


def test_several_updates_a_step():
    assert rates("constant", 2, updates=3)[:6] == pytest.approx([n / 12 for n in range(1, 7)])
