"""Context distillation: what is written with the solution in the prompt, learnt without it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import cross_entropy


class ContextDistill(Method):
    """Mean cross-entropy, under the student's prompt, of samples drawn under the teacher's."""

    teacher_prompt = True
    imitates = True

    @classmethod
    def source(cls, config: Config) -> str:
        return "teacher"

    def loss(
        self, samples: Sequence[Sample], precomputed: None, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        return cross_entropy(self.policy, samples, num_tokens)
