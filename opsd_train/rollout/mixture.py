"""A mixture of student and teacher to sample from, token by token (MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from opsd_train.model.policy import Policy
from opsd_train.rollout.request import Request
from opsd_train.rollout.sequences import Sequences


@dataclass(frozen=True)
class TeacherMixture:
    """(1 - share) s + share t, Eq. 4: the teacher reads each request's `teacher_prompt`."""

    policy: Policy
    """The teacher, its weights whole on this process."""
    share: float

    def sequences(self, requests: Sequence[Request], room: int, pad_id: int) -> Sequences:
        """The teacher's sequences of a batch."""
        prompts = [request.teacher_prompt or request.prompt for request in requests]
        return Sequences(self.policy.core, prompts, room, pad_id, self.policy.dtype)

    def logprobs(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """(B, V) log-probabilities of the mixture from both models' logits.

        The vocabulary is the student's; the teacher's is cut or ends earlier where it is padded
        otherwise.
        """
        mixed = (student / temperature).softmax(-1) * (1 - self.share)
        common = min(student.shape[-1], teacher.shape[-1])
        own = (teacher[:, :common] / temperature).softmax(-1)
        mixed[:, :common] += self.share * own
        return mixed.log()
