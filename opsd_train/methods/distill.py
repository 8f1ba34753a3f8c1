"""Distillation from another model, on the student's samples (Eq. 3) or on solutions (Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opsd_kernels.integrations.heads import lm_head
from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Source, Stats
from opsd_train.methods.distillation import Distribution, distillation
from opsd_train.methods.teachers import Teacher
from opsd_train.model.policy import Policy


class Distill(Method):
    """Divergence from a frozen teacher that reads the student's prompt, or its own.

    The teacher may have another hidden size and another padding of the vocabulary, but must have
    the student's tokenizer.
    """

    divergence = True

    def __init__(self, config: Config, policy: Policy, teacher: Teacher) -> None:
        super().__init__(config, policy)
        self.teacher = teacher
        self.temperature = config.loss.temperature
        self._vocab_size = lm_head(policy.core).weight.shape[0]

    @classmethod
    def source(cls, config: Config) -> Source:
        """The student's samples if `distill.on_policy`, else the reference solutions."""
        assert config.distill is not None
        return "student" if config.distill.on_policy else "solution"

    @classmethod
    def teacher_prompt(cls, config: Config) -> bool:
        """The teacher reads its own prompt with `distill.prompt=teacher`."""
        assert config.distill is not None
        return config.distill.prompt == "teacher"

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Distribution]:
        """The teacher's distributions for each micro-batch, without gradient.

        Raises UserError if a completion has a token that one of the models does not have.
        """
        for sample in (sample for group in groups for sample in group):
            self._check_tokens(sample)
        return [self.teacher.distribution(group) for group in groups]

    def loss(
        self, samples: Sequence[Sample], precomputed: Distribution, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """The objective over one micro-batch; see `distillation`."""
        return distillation(self.policy, samples, precomputed, self.config.loss, num_tokens)

    def _check_tokens(self, sample: Sample) -> None:
        """A student can sample an id from the padding of its vocabulary that the teacher lacks."""
        largest = max(sample.completion)
        if largest >= min(self._vocab_size, self.teacher.vocab_size):
            assert self.config.distill is not None
            raise UserError(
                f"distill.teacher={self.config.distill.teacher}: the completion of problem "
                f"{sample.problem.id} has token {largest}, but the student's vocabulary has "
                f"{self._vocab_size} entries and the teacher's "
                f"{self.teacher.vocab_size}; no text has this token: lower rollout.top_p so "
                "that it is not sampled"
            )
