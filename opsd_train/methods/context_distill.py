"""Context distillation: train the student on completions sampled under the teacher's prompt.

The model learns to write without the solution what it writes with the solution in its prompt.
It follows Snell et al., "Learning by Distilling Context" (2022); the paper does not have it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Source, Stats
from opsd_train.methods.common import cross_entropy


class ContextDistill(Method):
    """Mean cross-entropy under the student's prompt of samples drawn under the teacher's prompt."""

    imitates = True

    @classmethod
    def source(cls, config: Config) -> Source:
        """Completions are sampled under the teacher's prompt."""
        return "teacher"

    @classmethod
    def teacher_prompt(cls, config: Config) -> bool:
        """Completions are sampled under it."""
        return True

    def loss(
        self, samples: Sequence[Sample], precomputed: None, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """-log s(y) per token; statistics `logprob` and `entropy`."""
        return cross_entropy(self.policy, samples, num_tokens)
