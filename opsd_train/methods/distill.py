"""Distillation from other models, on the student's samples (Eq. 3) or on solutions (Eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from opsd_kernels.integrations.heads import lm_head
from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method, Source, Stats
from opsd_train.methods.distributions import Distribution
from opsd_train.methods.teacher_loss import Fixed, TeacherLoss
from opsd_train.methods.teachers import Teacher
from opsd_train.model.policy import Policy


class Distill(Method):
    """Divergence from a frozen teacher that reads the student's prompt, or its own.

    A teacher may have another hidden size and another padding of the vocabulary, but must have
    the student's tokenizer. Of several, each problem names its own.
    """

    divergence = True

    def __init__(
        self, config: Config, policy: Policy, teachers: Mapping[str | None, Teacher]
    ) -> None:
        """`teachers`: by the name that a problem's `teacher` has."""
        super().__init__(config, policy)
        self.teachers = teachers
        self.temperature = config.loss.temperature
        self.teacher_loss = TeacherLoss(config, policy)
        self._vocab_size = lm_head(policy.core).weight.shape[0]

    @classmethod
    def source(cls, config: Config) -> Source:
        """The student's samples unless `distill.on_policy` is false or 0; a share between 0 and 1
        has some steps on the reference solutions (see Trajectories)."""
        assert config.distill is not None
        return "student" if config.distill.on_policy else "solution"

    @classmethod
    def sources(cls, config: Config) -> tuple[Source, ...]:
        """The student's samples, the reference solutions, or both: by `distill.on_policy`."""
        assert config.distill is not None
        mixed = 0 < float(config.distill.on_policy) < 1
        return ("student", "solution") if mixed else (cls.source(config),)

    @classmethod
    def teacher_prompt(cls, config: Config) -> bool:
        """A teacher reads its own prompt with `prompt: teacher`."""
        assert config.distill is not None
        return any(teacher.prompt == "teacher" for teacher in config.distill.by_name().values())

    def assign_weights(self, samples: list[Sample]) -> list[Sample]:
        """The weights of each sample in the terms of the loss."""
        return self.teacher_loss.assign(samples)

    def precompute(self, groups: Sequence[Sequence[Sample]]) -> list[Fixed]:
        """The teachers' distributions for each micro-batch, without gradient.

        Raises UserError if a completion has a token that one of the models does not have.
        """
        for sample in (sample for group in groups for sample in group):
            self._check_tokens(sample)
        return [self.teacher_loss.fix(group, self._distributions(group)) for group in groups]

    def loss(
        self, samples: Sequence[Sample], precomputed: Fixed, num_tokens: int
    ) -> tuple[torch.Tensor, Stats]:
        """The terms over one micro-batch; see `TeacherLoss` for the statistics."""
        return self.teacher_loss.loss(samples, precomputed, num_tokens, self.step)

    def _distributions(self, group: Sequence[Sample]) -> list[Distribution]:
        """What each teacher predicts of its samples."""
        if len(self.teachers) == 1:
            (teacher,) = self.teachers.values()
            return [teacher.distribution(group)]
        lengths = torch.tensor([len(sample.completion) for sample in group])
        names = [sample.problem.teacher for sample in group]
        found: list[Distribution] = []
        for name, teacher in self.teachers.items():
            own = torch.tensor([other == name for other in names])
            if own.any():
                tokens = own.repeat_interleave(lengths).nonzero().flatten().to(self.policy.device)
                made = teacher.distribution([s for s in group if s.problem.teacher == name])
                found.append(replace(made, tokens=tokens))
            elif teacher.sharded:  # another rank may have samples of it
                first = group[0]
                teacher.distribution([replace(first, completion=first.completion[:1])])
        return found

    def _check_tokens(self, sample: Sample) -> None:
        """A student can sample an id from the padding of its vocabulary that the teacher lacks."""
        largest = max(sample.completion)
        name = sample.problem.teacher
        entries = self.teachers[name].vocab_size
        if largest >= min(self._vocab_size, entries):
            assert self.config.distill is not None
            raise UserError(
                f"distill.teacher={self.config.distill.by_name()[name].teacher}: the completion of "
                f"problem {sample.problem.id} has token {largest}, but the student's vocabulary "
                f"has {self._vocab_size} entries and the teacher's {entries}; no text has this "
                "token: lower rollout.top_p so that it is not sampled"
            )
