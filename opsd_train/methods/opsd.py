"""On-policy self-distillation: the model with the solution in its prompt is its own teacher.

The student samples the completions; student and teacher both read them.
Full vocabulary (Eq. 6-8): the mean over completion tokens of a divergence between the student's and
the teacher's next-token distributions. Top k: the same over the teacher's k most likely tokens and
one outcome for the rest. Sampled token (Eq. 9): the mean of -A log s(y), where A = log t(y) -
log s(y) is held constant; s and t are the student's and the teacher's probability of the sampled
token y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from opsd_train.config.method_schema import OpsdConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.distillation import Distribution, distillation, teacher_distribution
from opsd_train.methods.ref_policy import RefPolicy
from opsd_train.model.policy import Policy


class Opsd(Method):
    """Divergence from the teacher, or the sampled token's advantage; the recipe's `loss.objective`
    picks which."""

    divergence = True

    @classmethod
    def teacher_prompt(cls, config: Config) -> bool:
        """The teacher reads its own prompt."""
        return True

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(config, policy)
        self.temperature = config.loss.temperature
        self.settings = config.opsd or OpsdConfig()
        self.needs_rewards = self.settings.verify_weight is not None
        self.teacher = RefPolicy(policy, self.settings.teacher, self.settings.ema_decay)

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        """The weights of `opsd.verify_weight`; without it every sample has weight 1."""
        verify = self.settings.verify_weight
        if verify is None:
            return samples
        return [replace(s, weight=verify.correct if s.correct else verify.wrong) for s in samples]

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Distribution]:
        """The teacher's forward pass over each micro-batch, without gradient."""
        loss = self.config.loss
        with self.teacher.active():
            # The top tokens are found inside the forward pass; hidden states are read later.
            head = None if loss.objective == "top_k" else self.teacher.head()
            return [
                teacher_distribution(self.policy, group, "teacher", loss, head=head)
                for group in groups
            ]

    def loss(
        self, samples: Sequence[Sample], precomputed: Distribution, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """The objective over one micro-batch; see `distillation` for the statistics."""
        stale = bool(self.config.rollout.ahead)
        return distillation(
            self.policy, samples, [precomputed], self.config.loss, num_tokens, stale=stale
        )

    def after_step(self) -> None:
        """Update the teacher's moving average."""
        self.teacher.after_step()

    def state(self) -> dict[str, Tensor]:
        """The teacher's weights, where they are a copy."""
        return self.teacher.state()
