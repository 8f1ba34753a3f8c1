"""On-policy self-distillation: the same model, shown the solution, teaches over its own rollouts.

Full vocabulary (Eq. 6-8): the mean over completion tokens of a divergence between student and
teacher. Sampled token (Eq. 9): -A log s(y) with A = log t(y) - log s(y) held constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from opsd_train.config.schema import Config, OpsdConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import distillation, teacher_hidden
from opsd_train.methods.ref_policy import RefPolicy
from opsd_train.model.families import LmHead
from opsd_train.model.policy import Policy

Precomputed = tuple[
    Tensor, LmHead | None
]  # the teacher's hidden states (N, D); its head if another


class Opsd(Method):
    """See the module's text."""

    teacher_prompt = True
    divergence = True

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(config, policy)
        self.temperature = config.loss.temperature
        self.settings = config.opsd or OpsdConfig()
        self.needs_rewards = self.settings.verify_weight is not None
        self.teacher = RefPolicy(policy, self.settings.teacher, self.settings.ema_decay)

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        verify = self.settings.verify_weight
        if verify is None:
            return samples
        return [replace(s, weight=verify.correct if s.correct else verify.wrong) for s in samples]

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Precomputed]:
        with self.teacher.active():
            head = self.teacher.head()
            return [(teacher_hidden(self.policy, group), head) for group in groups]

    def loss(
        self, samples: Sequence[Sample], precomputed: Precomputed, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        return distillation(self.policy, samples, *precomputed, self.config.loss, num_tokens)

    def after_step(self) -> None:
        self.teacher.after_step()

    def state(self) -> dict[str, Tensor]:
        return self.teacher.state()
