"""A mixture of student and teacher to sample from, token by token (MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.methods.base import Method
from opsd_train.methods.distill import Distill
from opsd_train.methods.teachers import LocalTeacher
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


def mixture_of(config: Config, method: Method) -> TeacherMixture | None:
    """The teacher that samples are drawn from too, where distill.sampler_share says so.

    Raises UserError if its weights are spread over the processes.
    """
    if config.distill is None or not config.distill.sampler_share:
        return None
    assert isinstance(method, Distill)
    (teacher,) = method.teachers.values()
    assert isinstance(teacher, LocalTeacher)
    if teacher.sharded:  # ranks generate alone, and its layers need all of them
        raise UserError(
            "distill.sampler_share needs the whole teacher on every process: run one process, or "
            "--shard none"
        )
    return TeacherMixture(teacher.policy, config.distill.sampler_share)
