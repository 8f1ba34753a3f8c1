"""Distillation from another model, on the student's samples (Eq. 3) or on solutions (Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import distillation, teacher_hidden
from opsd_train.model.families import lm_head
from opsd_train.model.policy import Policy


class Distill(Method):
    """The teacher reads the student's prompt; sizes may differ, the tokenizer may not."""

    divergence = True

    def __init__(self, config: Config, policy: Policy, teacher: Policy) -> None:
        super().__init__(config, policy)
        self.teacher = teacher
        self.temperature = config.loss.temperature
        models = {"student": policy, "teacher": teacher}
        self._rows = {name: lm_head(p.core).weight.shape[0] for name, p in models.items()}

    @classmethod
    def source(cls, config: Config) -> str:
        return "student" if config.distill.on_policy else "solution"

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Tensor]:
        for sample in (sample for group in groups for sample in group):
            self._check_tokens(sample)
        return [teacher_hidden(self.teacher, group, own_prompt=False) for group in groups]

    def loss(
        self, samples: Sequence[Sample], precomputed: Tensor, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        head = lm_head(self.teacher.core)  # whole on every rank: only the layers are sharded
        return distillation(self.policy, samples, precomputed, head, self.config.loss, num_tokens)

    def _check_tokens(self, sample: Sample) -> None:
        """A student may sample from the padding of its vocabulary, which the teacher's lacks."""
        largest = max(sample.completion)
        if largest >= min(self._rows.values()):
            raise UserError(
                f"distill.teacher={self.config.distill.teacher}: the completion of problem "
                f"{sample.problem.id} has token {largest}, but the student's vocabulary has "
                f"{self._rows['student']} entries and the teacher's {self._rows['teacher']}; "
                "no text gives this token: lower rollout.top_p so that it is not sampled"
            )
