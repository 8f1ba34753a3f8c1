"""Losses that several methods share, from samples to opsd_kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import (
    fused_linear_advantage,
    fused_linear_cross_entropy,
    fused_linear_jsd,
    policy_gradient_loss,
)
from opsd_train.config.schema import LossConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Stats
from opsd_train.model.families import LmHead
from opsd_train.model.policy import LossFn, Policy


def teacher_hidden(policy: Policy, samples: Sequence[Sample], own_prompt: bool = True) -> Tensor:
    """(N, D) hidden states for the completions under the teacher's prompts; no logits.

    `own_prompt`: False for a teacher that reads what the student reads.
    """
    prompts = [s.teacher_prompt if own_prompt else s.student_prompt for s in samples]
    with torch.no_grad():
        return policy.run(prompts, [s.completion for s in samples], lambda hidden, *_: hidden)


def workspace_bytes(device: torch.device, trained: bool) -> int | None:
    """For the losses' logits; `trained`: the head is. None: what opsd_kernels takes by itself."""
    # It comes on top of all activations. A frozen head on a CPU is as fast with this much.
    return 64 * 2**20 if device.type == "cpu" and not trained else None


def token_weights(samples: Sequence[Sample], device: torch.device) -> Tensor | None:
    """(N,) weight of each token; None where all are 1."""
    if all(sample.weight == 1 for sample in samples):
        return None
    weights = torch.tensor([sample.weight for sample in samples])
    lengths = torch.tensor([len(sample.completion) for sample in samples])
    return weights.repeat_interleave(lengths).to(device)


def distillation(
    policy: Policy,
    samples: Sequence[Sample],
    hidden: Tensor,
    teacher: LmHead | None,
    config: LossConfig,
    num_tokens: int,
) -> tuple[Tensor, Stats]:
    """Divergence or sampled-token loss against the teacher's `hidden` states (N, D_t).

    `teacher` None: the student's own head serves both. `divergence` among the statistics is what
    is trained on; for the sampled token it is the estimate log s(y) - log t(y) of the reverse KL.
    """
    weights = token_weights(samples, policy.device)

    def loss_fn(student: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Stats]:
        other = teacher or head
        pair = (student, head.weight, hidden, other.weight, target)
        options = _pair_options(head, other, config.temperature)
        if config.objective == "full_vocabulary":
            return fused_linear_jsd(
                *pair,
                beta=config.beta,
                token_clip=config.token_clip,
                token_weight=weights,
                num_tokens=num_tokens,
                return_stats=True,
                **options,
            )
        advantage, logprob = fused_linear_advantage(*pair, **options)
        loss = policy_gradient_loss(advantage, logprob, token_weight=weights, num_tokens=num_tokens)
        return loss, {"divergence": -advantage, "logprob": logprob.detach()}

    return student_run(policy, samples, loss_fn)


def cross_entropy(
    policy: Policy, samples: Sequence[Sample], num_tokens: int
) -> tuple[Tensor, Stats]:
    """Cross-entropy of the completions under the student's prompts."""
    weights = token_weights(samples, policy.device)

    def loss_fn(student: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Stats]:
        loss, stats = fused_linear_cross_entropy(
            student,
            head.weight,
            target,
            token_weight=weights,
            num_tokens=num_tokens,
            return_stats=True,
            **head_options(head),
        )
        return loss, {name: stats[name] for name in ("logprob", "entropy")}

    return student_run(policy, samples, loss_fn)


def student_run(policy: Policy, samples: Sequence[Sample], function: LossFn) -> Any:
    """`function` of the completions under the student's prompts; see Policy.run."""
    prompts = [sample.student_prompt for sample in samples]
    return policy.run(prompts, [sample.completion for sample in samples], function)


def head_options(head: LmHead) -> dict[str, Any]:
    """What a loss of one head is told about it."""
    trained = head.weight.requires_grad
    return {
        "bias": head.bias,
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "workspace_bytes": workspace_bytes(head.weight.device, trained),
    }


def _pair_options(student: LmHead, teacher: LmHead, temperature: float) -> dict[str, Any]:
    """Heads padded to different sizes share the rows that both have."""
    sizes = {student.weight.shape[0], teacher.weight.shape[0]}
    trained = student.weight.requires_grad
    return {
        "temperature": temperature,
        "student_bias": student.bias,
        "teacher_bias": teacher.bias,
        "student_softcap": student.softcap,
        "teacher_softcap": teacher.softcap,
        "student_logit_scale": student.logit_scale,
        "teacher_logit_scale": teacher.logit_scale,
        "vocab_size": min(sizes) if len(sizes) > 1 else None,
        "workspace_bytes": workspace_bytes(student.weight.device, trained),
    }
