"""Context distillation: train the student on completions sampled under the teacher's prompt.

The model learns to write without the solution what it writes with the solution in its prompt.
As in Snell et al., "Learning by Distilling Context" (2022), the samples are of the model before
training: those of the present one would drift with it. The paper does not have this method.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Source, Stats
from opsd_train.methods.common import cross_entropy
from opsd_train.methods.ref_policy import RefPolicy
from opsd_train.model.policy import Policy


class ContextDistill(Method):
    """Mean cross-entropy under the student's prompt of samples that the initial policy draws under
    the teacher's prompt."""

    imitates = True

    @classmethod
    def source(cls, config: Config) -> Source:
        """Completions are sampled under the teacher's prompt."""
        return "teacher"

    @classmethod
    def teacher_prompt(cls, config: Config) -> bool:
        """Completions are sampled under it."""
        return True

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(config, policy)
        self.teacher = RefPolicy(policy, "initial")

    def sampling(self) -> AbstractContextManager[None]:
        """The initial policy samples."""
        return self.teacher.active()

    def loss(
        self, samples: Sequence[Sample], precomputed: None, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """-log s(y) per token; statistics `logprob` and `entropy`."""
        return cross_entropy(self.policy, samples, num_tokens)

    def state(self) -> dict[str, Tensor]:
        """The initial policy's weights, where they are a copy."""
        return self.teacher.state()
