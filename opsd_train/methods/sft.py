"""Supervised fine-tuning: cross-entropy on the reference solutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import cross_entropy


class Sft(Method):
    """Mean cross-entropy of the solutions' tokens, given the student's prompt."""

    @classmethod
    def source(cls, config: Config) -> str:
        return "solution"

    def loss(
        self, samples: Sequence[Sample], precomputed: None, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        return cross_entropy(self.policy, samples, num_tokens)
