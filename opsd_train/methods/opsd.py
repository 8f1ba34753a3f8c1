"""On-policy self-distillation: the same model, shown the solution, teaches over its own rollouts.

Full vocabulary (Eq. 6-8): the mean over completion tokens of a divergence between student and
teacher. Sampled token (Eq. 9): -A log s(y) with A = log t(y) - log s(y) held constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from opsd_kernels import fused_linear_advantage, fused_linear_jsd, policy_gradient_loss
from opsd_train.batches import Sample, make_batch
from opsd_train.model import LmHead, completion_hidden, initial_policy, lm_head
from opsd_train.sections import LossConfig


@dataclass(frozen=True)
class TeacherView:
    """The teacher's hidden states (N, D) for the completions of some samples."""

    hidden: Tensor


def teacher_view(model: PeftModel, samples: Sequence[Sample], pad_id: int) -> TeacherView:
    """Run the initial policy under the privileged prompts; no gradient, no logits."""
    batch = make_batch(
        [sample.teacher_prompt for sample in samples],
        [sample.completion for sample in samples],
        pad_id,
        model.device,
    )
    with torch.no_grad(), initial_policy(model):
        return TeacherView(completion_hidden(model, batch))


def student_loss(
    model: PeftModel,
    samples: Sequence[Sample],
    teacher: TeacherView,
    pad_id: int,
    config: LossConfig,
    num_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of these samples, divided by the step's `num_tokens`, and (N,) statistics per token.

    `divergence` among the statistics is the one trained on; for the sampled token it is the
    estimate log s(y) - log t(y) of the reverse KL.
    """
    batch = make_batch(
        [sample.student_prompt for sample in samples],
        [sample.completion for sample in samples],
        pad_id,
        model.device,
    )
    hidden, head = completion_hidden(model, batch), lm_head(model)
    if config.objective == "sampled_token":
        return _sampled_token(hidden, teacher.hidden, head, batch.targets, config, num_tokens)
    return fused_linear_jsd(
        hidden,
        head.weight,
        teacher.hidden,
        head.weight,
        batch.targets,
        student_bias=head.bias,
        teacher_bias=head.bias,
        beta=config.beta,
        temperature=config.temperature,
        token_clip=config.token_clip,
        student_softcap=head.softcap,
        teacher_softcap=head.softcap,
        num_tokens=num_tokens,
        return_stats=True,
    )


def _sampled_token(
    student: Tensor,
    teacher: Tensor,
    head: LmHead,
    target: Tensor,
    config: LossConfig,
    num_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    advantage, logprob = fused_linear_advantage(
        student,
        head.weight,
        teacher,
        head.weight,
        target,
        student_bias=head.bias,
        teacher_bias=head.bias,
        temperature=config.temperature,
        student_softcap=head.softcap,
        teacher_softcap=head.softcap,
    )
    loss = policy_gradient_loss(advantage, logprob, num_tokens=num_tokens)
    return loss, {"divergence": -advantage}
