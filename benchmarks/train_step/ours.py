"""opsd_train's own Trainer, step by step."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from benchmarks.train_step.meters import Phases, forward_phase
from benchmarks.train_step.steps import Step, StepHooks, trainable_dtypes
from benchmarks.train_step.workload import Workload
from opsd_train.methods import opsd
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.trainer import Clock, Trainer


class _FullLength(TransformersEngine):
    """No completion ends before its last allowed token."""

    def _settings(self, max_new_tokens: int, sampled: bool) -> GenerationConfig:
        settings = super()._settings(max_new_tokens, sampled)
        settings.min_new_tokens = max_new_tokens
        return settings


class OpsdTrain:
    """Setup, then `run`: one `Trainer.step` after another on the same problems."""

    def __init__(self, work: Workload, phases: Phases) -> None:
        config = work.config
        self.trainer = Trainer(config, Clock())
        self.trainer.engine = _FullLength(
            self.trainer.model, self.trainer.tokenizer, config.rollout
        )
        self.problems = [sample.problem for sample in work.samples]
        self.steps = config.steps
        phases.wrap(self.trainer.engine, "generate", "rollout")
        phases.wrap(opsd, "completion_hidden", forward_phase)
        phases.wrap(opsd, "fused_linear_jsd", "loss")

    def facts(self) -> dict[str, Any]:
        return {
            "adapters": trainable_dtypes(self.trainer.model),
            "mixed_precision": "no",
            "optimizer": type(self.trainer.optimizer).__name__,
        }

    def run(self, hooks: StepHooks) -> None:
        for number in range(1, self.steps + 1):
            hooks.begin()
            tokens = self.trainer.tokens
            row, _ = self.trainer.step(number, self.problems)
            hooks.end(Step(row["loss"], self.trainer.tokens - tokens))
