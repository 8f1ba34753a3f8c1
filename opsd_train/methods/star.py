"""STaR (Appendix C.1, Eq. 10-11): cross-entropy of the student's own samples that are correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import cross_entropy


class Star(Method):
    """Mean cross-entropy over the tokens of the samples with a correct answer."""

    imitates = True
    needs_rewards = True

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        """Weight 1 for a correct answer, 0 for a wrong one."""
        return [replace(sample, weight=1.0 if sample.correct else 0.0) for sample in samples]

    def loss(
        self, samples: Sequence[Sample], precomputed: None, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """-log s(y) per token; statistics `logprob` and `entropy`."""
        return cross_entropy(self.policy, samples, num_tokens)
