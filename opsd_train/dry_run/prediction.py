"""A recipe's run on N ranks: each rank's peak memory, and a step's seconds on a device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opsd_train.config.method_schema import OpsdConfig
from opsd_train.config.schema import Config
from opsd_train.distributed.context import resolve_device
from opsd_train.dry_run.devices import Device, Seconds
from opsd_train.dry_run.largest_step import PlannedStep, plan_step
from opsd_train.dry_run.memory import PhaseMemory, Setup, Sizes, predict
from opsd_train.dry_run.operations import CountedLayer
from opsd_train.dry_run.setup import setup_of, teacher_model, teachers_of
from opsd_train.dry_run.step_time import Reader, Run, predict_seconds


@dataclass(frozen=True)
class Prediction:
    """The largest step of a recipe, and what it takes."""

    config: Config
    step: PlannedStep
    setup: Setup
    sizes: Sizes
    device: Device | None  # that the time is of
    unknown: tuple[str, ...]  # layers for which nothing is predicted
    memory: tuple[Mapping[str, PhaseMemory], ...]  # each rank's phases
    seconds: Mapping[str, Seconds]  # of each phase; empty without a device

    @property
    def most(self) -> Mapping[str, PhaseMemory]:
        """The phases of the rank with the highest peak."""
        return max(self.memory, key=peak)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, without the rollouts of other engines."""
        return sum(phase.total for phase in self.seconds.values())


def predict_run(
    config: Config, shard: str = "full", ranks: int | None = None, device: Device | None = None
) -> Prediction:
    """Predict the recipe's largest step on `ranks` processes, by default as many as torchrun's.

    `device`: None predicts no time, and memory on the recipe's own device. Raises UserError for a
    recipe that cannot be run.
    """
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 1))
    step = plan_step(config, ranks)
    kind = torch.device(device.kind) if device else resolve_device(config.model.device)
    setup, sizes = setup_of(config, shard, ranks, kind)
    models = (sizes, *(other.sizes for other in setup.others))
    unknown = next((found.unknown for found in models if found.unknown), ())
    memory: tuple[Mapping[str, PhaseMemory], ...] = ()
    seconds: Mapping[str, Seconds] = {}
    if not unknown:
        each = {share: predict(sizes, share, setup) for share in set(step.ranks)}
        memory = tuple(each[share] for share in step.ranks)
        if device is not None:
            seconds = predict_seconds(_run(config, step, setup, sizes, device))
    return Prediction(config, step, setup, sizes, device, unknown, memory, seconds)


def peak(phases: Mapping[str, PhaseMemory]) -> int:
    """The highest peak of a rank's phases, in bytes."""
    return max(phase.total for phase in phases.values())


def _run(config: Config, step: PlannedStep, setup: Setup, sizes: Sizes, device: Device) -> Run:
    student = Reader(
        sizes,
        CountedLayer(config.model, config.lora, sharded=setup.processes > 1),
        setup.itemsize,
        setup.shards,
    )
    teachers = [student] if setup.teacher else []
    models = [t for t in teachers_of(config).values() if t.in_memory]
    for teacher, other in zip(models, setup.others, strict=True):
        model = teacher_model(config, teacher)
        layer = CountedLayer(model, None, sharded=True)
        # Each of its layers is an FSDP root of its own, which waits for all computation before it.
        teachers.append(Reader(other.sizes, layer, other.itemsize, setup.shards, prefetches=False))
    opsd = (config.opsd or OpsdConfig()) if config.method == "opsd" else None
    return Run(
        step=step,
        setup=setup,
        student=student,
        teachers=tuple(teachers),
        own_teacher=setup.teacher is not None,
        initial=config.method == "grpo" or (opsd is not None and opsd.teacher == "initial"),
        updates=config.updates_per_step,
        averages=opsd is not None and opsd.teacher == "ema",
        device=device,
    )
