"""Supervised fine-tuning: cross-entropy of the reference solutions (Section 3.1, Table 5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Source, Stats
from opsd_train.methods.common import cross_entropy


class Sft(Method):
    """Mean cross-entropy over the tokens of the solutions, given the student's prompt."""

    @classmethod
    def source(cls, config: Config) -> Source:
        """Completions are the reference solutions; nothing is generated."""
        return "solution"

    def loss(
        self, samples: Sequence[Sample], precomputed: None, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """-log s(y) per token; statistics `logprob` and `entropy`."""
        return cross_entropy(self.policy, samples, num_tokens)
