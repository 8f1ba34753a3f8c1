"""STaR (Appendix C): the student's own samples, those with the right answer kept, as targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import cross_entropy


class Star(Method):
    """Mean cross-entropy over the tokens of correct trajectories."""

    imitates = True
    needs_rewards = True

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        return [replace(sample, weight=float(sample.correct)) for sample in samples]

    def loss(
        self, samples: Sequence[Sample], precomputed: None, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        return cross_entropy(self.policy, samples, num_tokens)
