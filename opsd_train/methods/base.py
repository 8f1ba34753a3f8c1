"""The interface between the training loop and a method, with defaults for the simplest method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.model.policy import Policy

Stats = dict[str, Tensor]
"""Detached (N,) statistics by name, one value per completion token of a micro-batch."""

Source = Literal["student", "teacher", "solution"]


class Method(ABC):
    """One training method. In each step the loop calls, in this order and on every rank:

    sampling        around the rollout: the weights that it is of
    assign_weights  after the rollout: which samples are trained on, and with what weight
    precompute      without gradient, for all micro-batches at once: the teacher's hidden states,
                    log-probabilities of the reference policy
    loss            once per micro-batch: its part of the step's loss, with statistics
    after_step      after each optimizer step
    """

    divergence: bool = False
    """Whether the statistics include a divergence from a teacher."""
    imitates: bool = False
    """Whether generated samples are cross-entropy targets. They then end with the chat template's
    end of turn."""
    needs_rewards: bool = False
    """Whether `assign_weights` needs graded answers. If not, grading runs in parallel with the
    step."""
    temperature: float = 1.0
    """Temperature of the log-probabilities in the statistics."""

    @classmethod
    def source(cls, config: Config) -> Source:
        """Where completions come from: sampled under the student's or the teacher's prompt, or the
        reference solutions."""
        return "student"

    @classmethod
    def sources(cls, config: Config) -> tuple[Source, ...]:
        """`source`, and where some steps train on reference solutions, those too."""
        return (cls.source(config),)

    @classmethod
    def teacher_prompt(cls, config: Config) -> bool:
        """Whether the method needs the teacher's prompt."""
        return False

    @classmethod
    def required_texts(cls, config: Config) -> tuple[str, ...]:
        """The texts of a problem ("student", "teacher", "solution") whose length is limited."""
        teacher = cls.teacher_prompt(config)
        solution = "solution" in cls.sources(config)
        return ("student", *["teacher"] * teacher, *["solution"] * solution)

    def __init__(self, config: Config, policy: Policy) -> None:
        self.config, self.policy = config, policy
        self.step = 1  # the present training step, which the loop sets

    def sampling(self) -> AbstractContextManager[None]:
        """Within this context the policy has the weights that completions are sampled with."""
        return nullcontext()

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        """Set the weights and advantages of a step's samples; all samples of a problem are there.

        Returns as many samples as it gets. A weight of 0 leaves a sample out of the loss.
        """
        return samples

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Any]:
        """What `loss` needs besides the samples, one entry per micro-batch."""
        return [None] * len(groups)

    @abstractmethod
    def loss(
        self, samples: Sequence[Sample], precomputed: Any, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """The loss of one micro-batch, a scalar, and its statistics.

        The loss is the sum over the micro-batch's tokens divided by `num_tokens`, the number of
        loss tokens in the whole step: losses of micro-batches and ranks add up to the step's mean.
        """

    def after_step(self) -> None:
        """Update what depends on the policy's weights, such as a moving average."""
        return

    def extra_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics that only this method has, from the step's samples of all ranks."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors to save in a checkpoint. Loading a checkpoint fills them in place."""
        return {}
