"""What the loop asks of a method, with the answers of a method that asks for nothing special."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.model.policy import Policy

Stats = dict[str, Tensor]


class Method(ABC):
    """One training method. The loop calls, in this order and on every rank alike:

    assign_weights  after the rollout: which samples count, and how much
    precompute      without gradient, for all micro-batches: the teacher's hidden states,
                    log-probabilities of the reference policy
    loss            for every micro-batch: its loss over the step's `num_tokens`, with statistics
    after_step      after each optimizer step
    """

    teacher_prompt: bool = False
    """Whether anything is read under the teacher's prompt."""
    divergence: bool = False
    """Whether the statistics hold a divergence from a teacher."""
    imitates: bool = False
    """Whether its samples are targets of a cross-entropy, which end as a turn of the chat ends."""
    needs_rewards: bool = False
    """Whether `assign_weights` needs the answers checked; else they are checked beside the step."""
    updates: int = 1
    """Optimizer steps on one rollout."""
    temperature: float = 1.0
    """Of the log-probabilities among the statistics."""

    @classmethod
    def source(cls, config: Config) -> Literal["student", "teacher", "solution"]:
        """Trajectories: samples under one of the two prompts, or reference solutions."""
        return "student"

    @classmethod
    def required_texts(cls, config: Config) -> tuple[str, ...]:
        """The texts of a problem that must keep to their limits."""
        solution = cls.source(config) == "solution"
        return ("student", *["teacher"] * cls.teacher_prompt, *["solution"] * solution)

    def __init__(self, config: Config, policy: Policy) -> None:
        self.config, self.policy = config, policy

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        """The samples of whole problems, with their weights and advantages; none is removed."""
        return samples

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Any]:
        """What `loss` needs beside the samples, for each micro-batch."""
        return [None] * len(groups)

    @abstractmethod
    def loss(
        self, samples: Sequence[Sample], precomputed: Any, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """Sum over the tokens divided by `num_tokens`, and detached (N,) statistics."""

    def after_step(self) -> None:
        """The policy has changed: follow it."""
        return

    def extra_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics of the method's own about a step's samples, those of all ranks."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors to keep in a checkpoint; loading one fills them in place."""
        return {}
