"""opsd_train's Trainer as a contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.train_step.meters import Phases, forward_phase
from benchmarks.train_step.steps import Step, StepHooks, trainable_dtypes
from benchmarks.train_step.workload import Workload
from opsd_train.distributed.context import DistributedContext, resolve_device
from opsd_train.methods import objective
from opsd_train.model import policy as model
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.trainer import Trainer


class OpsdTrain:
    """`run` calls `Trainer.step` again and again on the same problems."""

    def __init__(self, work: Workload, phases: Phases) -> None:
        config = work.config
        context = DistributedContext(resolve_device(config.model.device))
        folder = RunFolder(Path(config.output_dir), context)
        self.trainer = Trainer(config, context, folder, PhaseTimer(), "full")
        problems = [sample.problem for sample in work.samples]
        self.trainer.order.draw = lambda step: problems
        self.trainer.trajectories.engine.stop = frozenset()  # every completion has its full length
        self.steps = config.steps
        phases.wrap(self.trainer.trajectories, "make", "rollout")
        phases.wrap(model, "completion_hidden", forward_phase)
        phases.wrap(objective, "fused_linear_jsd", "loss")

    def facts(self) -> dict[str, Any]:
        """Adapters' dtypes, mixed precision and optimizer."""
        return {
            "adapters": trainable_dtypes(self.trainer.policy.model),
            "mixed_precision": str(self.trainer.policy.dtype).removeprefix("torch."),
            "optimizer": type(self.trainer.optimizer).__name__,
        }

    def run(self, hooks: StepHooks) -> None:
        """Take all steps, the warm-up included."""
        for number in range(1, self.steps + 1):
            hooks.begin()
            row, _ = self.trainer.step(number)
            hooks.end(Step(row["loss"], row["loss_tokens"]))
