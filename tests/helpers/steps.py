"""Steps of a trainer on one rank or several, and everything about them that must be the same."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import full_tensor
from opsd_train.evaluation.grading import Answer
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.rollout.ahead import Rollout
from opsd_train.trainer import Trainer
from tests.helpers.tiny import config
from tests.helpers.verdicts import made_up

BASE = ["steps=2", "micro_batch_tokens=1000", "evaluation.problems=0", "optim.grad_clip=1e9"]


@dataclass(frozen=True)
class Course:
    """A recipe on a model of `models`, and which samples of a step count as correct.

    `right`: the "even" ones by their index in the step, the "first" one, or "none".
    """

    models: Path
    model: str = "tied"
    overrides: tuple[str, ...] = ()
    shard: str = "full"
    right: str = "even"
    most_weighted: int | None = None  # so many samples of a step keep their weight; None: all
    steps: int = 2
    # What to go on with after each update: else rounding grows from one to the next.
    updates: tuple[dict[str, Tensor], ...] | None = None


@dataclass
class Outcome:
    """The results of a course; tensors are gathered."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # on rank 0
    samples: list[list[tuple[str, list[int]]]] = field(default_factory=list)  # of this rank
    shown: list[list[str]] = field(default_factory=list)  # completions of the table, on rank 0
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # of each optimizer step
    updates: list[dict[str, Tensor]] = field(default_factory=list)  # weights after each of them
    initial: dict[str, Tensor] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)  # micro-batches of each step ...
    idle: list[int] = field(default_factory=list)  # ... and those without a loss token

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.updates[-1]


def make_trainer(context: DistributedContext, course: Course) -> Trainer:
    folder = Path(tempfile.mkdtemp())
    made = config(course.models / course.model, folder, *BASE, *course.overrides)
    with made_up():
        return Trainer(made, context, RunFolder(folder, context), PhaseTimer(), course.shard)


def follow(context: DistributedContext, course: Course) -> Outcome:
    """Take the course's steps and record their results."""
    trainer, outcome = make_trainer(context, course), Outcome()
    named = {
        name: parameter
        for name, parameter in trainer.policy.model.named_parameters()
        if parameter.requires_grad
    }
    outcome.initial = _whole(named)

    def note_gradients(*_: Any) -> None:
        gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
        outcome.gradients.append(_whole(gradients))

    def note_weights(*_: Any) -> None:
        outcome.updates.append(_whole(named))
        if course.updates is not None:
            _assign(named, course.updates[len(outcome.updates) - 1])

    trainer.optimizer.register_step_pre_hook(note_gradients)
    trainer.optimizer.register_step_post_hook(note_weights)
    trainer.rollouts.take = _noting(trainer.rollouts.take, outcome.samples)
    trainer.method.loss = _counting(trainer.method.loss, outcome)
    trainer.method.assign_weights = _limited(trainer.method.assign_weights, course.most_weighted)
    for step in range(1, course.steps + 1):
        outcome.trained.append(0)
        outcome.idle.append(0)
        trainer.grader.right = _check(context, course.right)
        row, stats = trainer.step(step)
        outcome.rows.append(row)
        outcome.shown.append([r["completion"] for r in stats.sample_rows(trainer.tokenizer, 100)])
    return outcome


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor.detach()).clone() for name, tensor in tensors.items()}


def _assign(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = values[name]
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            parameter.copy_(value)


def _noting(take: Callable, samples: list) -> Callable:
    def noting(step: int) -> Rollout:
        made = take(step)
        samples.append([(s.problem.id, s.completion, s.logprobs) for s in made.own])
        return made

    return noting


def _counting(loss: Callable, outcome: Outcome) -> Callable:
    def counting(samples: list, *rest: Any) -> Any:
        count = outcome.trained if samples[0].weight > 0 else outcome.idle
        count[-1] += 1
        return loss(samples, *rest)

    return counting


def _limited(assign_weights: Callable, most: int | None) -> Callable:
    def limited(samples: list) -> list:
        weighed = assign_weights(samples)
        active = [index for index, sample in enumerate(weighed) if sample.weight > 0]
        for index in active[most:] if most is not None else []:
            weighed[index] = replace(weighed[index], weight=0.0)
        return weighed

    return limited


def _check(context: DistributedContext, right: str) -> Callable[[Answer], bool]:
    """Called for this rank's samples in order, which are every size-th of the step's."""
    numbers = itertools.count(context.rank, context.size)

    def check(_: Answer) -> bool:
        number = next(numbers)
        return {"even": number % 2 == 0, "first": number == 0, "none": False}[right]

    return check


def assert_same_steps(one: Outcome, two: Outcome) -> None:
    """The same losses and gradients, to rounding, of steps that have both."""
    for row, other in zip(one.rows, two.rows, strict=True):
        for name in ("loss", "divergence", "student_entropy", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-4)
        assert row["loss"] > 0.01
    for gradients, others in zip(one.gradients, two.gradients, strict=True):
        assert gradients.keys() == others.keys() and gradients
        for name, gradient in gradients.items():
            assert gradient.norm() > 0
            assert (gradient - others[name]).norm() < 1e-4 * gradient.norm(), name
