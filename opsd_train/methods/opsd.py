"""On-policy self-distillation: the model with the solution in its prompt is its own teacher.

The student samples the completions; student and teacher both read them.
Full vocabulary (Eq. 6-8): the mean over completion tokens of a divergence between the student's and
the teacher's next-token distributions. Top k: the same over the teacher's k most likely tokens and
one outcome for the rest. Sampled token (Eq. 9): the mean of -A log s(y), where A = log t(y) -
log s(y) is held constant; s and t are the student's and the teacher's probability of the sampled
token y. With `grpo` a policy gradient over rewards is added, as in SDPO, RLSD, SDAR and SDPG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opsd_train.config.method_schema import OpsdConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.common import logprobs
from opsd_train.methods.distributions import Distribution, teacher_distribution
from opsd_train.methods.policy_gradient import groups_dropped, groups_of
from opsd_train.methods.ref_policy import RefPolicy
from opsd_train.methods.teacher_loss import Fixed, TeacherLoss
from opsd_train.model.policy import Policy


class Opsd(Method):
    """The terms of `loss` against the teacher, and with `grpo` a policy gradient."""

    divergence = True

    @classmethod
    def teacher_prompt(cls, config: Config) -> bool:
        """The teacher reads its own prompt."""
        return True

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(config, policy)
        self.temperature = config.loss.temperature
        self.settings = config.opsd or OpsdConfig()
        self.needs_rewards = self.settings.verify_weight is not None or config.grpo is not None
        self.teacher = RefPolicy(
            policy,
            self.settings.teacher,
            ema_decay=self.settings.ema_decay,
            resync_every=self.settings.resync_every,
            several_updates=config.updates_per_step > 1,
        )
        self.teacher_loss = TeacherLoss(config, policy)
        self.initial: RefPolicy | None = None
        if config.grpo and config.grpo.kl_weight:
            own = self.settings.teacher == "initial"
            self.initial = self.teacher if own else RefPolicy(policy, "initial", name="initial")

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        """The weights of `opsd.verify_weight`, and of each sample in each term of the loss."""
        verify = self.settings.verify_weight
        if verify is not None:
            samples = [
                replace(s, weight=verify.correct if s.correct else verify.wrong) for s in samples
            ]
        return self.teacher_loss.assign(samples)

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Fixed]:
        """The teacher's forward pass over each micro-batch, without gradient; and for a policy
        gradient the log-probabilities that it needs."""
        loss = self.config.loss
        with self.teacher.active():
            # The top tokens are found inside the forward pass; hidden states are read later.
            head = None if loss.objective == "top_k" else self.teacher.head()
            teachers: list[Distribution] = [
                teacher_distribution(self.policy, group, "teacher", loss, head=head)
                for group in groups
            ]
        refs: list[Tensor | None] = [None] * len(groups)
        if self.initial is not None:
            with torch.no_grad(), self.initial.active():
                refs = [logprobs(self.policy, group, loss.temperature) for group in groups]
        return [
            self.teacher_loss.fix(group, [teacher], ref)
            for group, teacher, ref in zip(groups, teachers, refs, strict=True)
        ]

    def loss(
        self, samples: Sequence[Sample], precomputed: Fixed, num_tokens: int
    ) -> tuple[Tensor, Stats]:
        """The terms over one micro-batch; see `TeacherLoss` for the statistics."""
        return self.teacher_loss.loss(samples, precomputed, num_tokens, self.step)

    def after_step(self) -> None:
        """Update the teacher's weights, where they follow the student's."""
        self.teacher.after_step(self.step)

    def extra_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """With `grpo`: `groups_dropped`, whose samples all got the same reward."""
        if self.config.grpo is None:
            return {}
        groups = groups_of(samples, self.config.rollout.samples_per_prompt)
        return {"groups_dropped": groups_dropped(groups)}

    def state(self) -> dict[str, Tensor]:
        """The weights of the teacher and of the initial policy, where they are copies."""
        return self.teacher.state() | (self.initial.state() if self.initial else {})
