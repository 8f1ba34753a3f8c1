"""What the methods' losses share: they pass a micro-batch's hidden states to opsd_kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import fused_linear_cross_entropy, fused_linear_logprob
from opsd_kernels.integrations.heads import LmHead
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Stats
from opsd_train.model.policy import LossFn, Policy


def workspace_bytes(device: torch.device, trained: bool) -> int | None:
    """Size of the losses' workspace for logits; `trained`: the head is trained.

    None leaves the choice to opsd_kernels.
    """
    # The workspace adds to all activations. On a CPU a frozen head is as fast with 64 MiB.
    return 64 * 2**20 if device.type == "cpu" and not trained else None


def token_weights(samples: Sequence[Sample], device: torch.device) -> Tensor | None:
    """(N,) weight of each completion token; None where all weights are 1."""
    if all(sample.weight == 1 for sample in samples):
        return None
    weights = torch.tensor([sample.weight for sample in samples])
    lengths = torch.tensor([len(sample.completion) for sample in samples])
    return weights.repeat_interleave(lengths).to(device)


def divergence_weights(samples: Sequence[Sample], device: torch.device) -> Tensor | None:
    """(N,) weight of each completion token in the divergence; None where all weights are 1."""
    own = [replace(sample, weight=sample.weight * sample.divergence_weight) for sample in samples]
    return token_weights(own, device)


def sampler_logprobs(samples: Sequence[Sample]) -> Tensor:
    """(N,) fp32 log-probability of each completion token under the sampler, on the CPU."""
    return torch.tensor([*chain.from_iterable(map(_own_logprobs, samples))])


def _own_logprobs(sample: Sample) -> list[float]:
    assert sample.logprobs is not None, "importance weights need the sampler's log-probabilities"
    return sample.logprobs


def importance_weight(logprob: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """(N,) min(p / q, cap), constant, with p the policy's and q the sampler's probability.

    Truncated importance sampling: a policy gradient over samples of q, times p / q, is that over
    samples of p; the cap trades some of it for less variance. Per token, as in IMPALA (Espeholt et
    al., 2018) and in "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao
    et al., 2025).
    """
    return (logprob.detach() - sampler).exp().clamp(max=cap)


def cross_entropy(
    policy: Policy, samples: Sequence[Sample], num_tokens: int
) -> tuple[Tensor, Stats]:
    """Cross-entropy of the completions under the student's prompts, over `num_tokens`.

    Returns the scalar loss and the (N,) statistics `logprob` and `entropy`.
    """
    weights = token_weights(samples, policy.device)

    def loss_fn(hidden: Tensor, head: LmHead, target: Tensor) -> tuple[Tensor, Stats]:
        loss, stats = fused_linear_cross_entropy(
            hidden,
            head.weight,
            target,
            token_weight=weights,
            num_tokens=num_tokens,
            return_stats=True,
            **head_options(head),
        )
        return loss, {name: stats[name] for name in ("logprob", "entropy")}

    return student_run(policy, samples, loss_fn)


def logprobs(policy: Policy, samples: Sequence[Sample], temperature: float, **options: Any) -> Any:
    """(N,) log-probabilities of the completion tokens under the student's prompts; see
    fused_linear_logprob for the options."""

    def function(hidden: Tensor, head: LmHead, target: Tensor) -> Any:
        return fused_linear_logprob(
            hidden, head.weight, target, temperature=temperature, **head_options(head), **options
        )

    return student_run(policy, samples, function)


def student_run(policy: Policy, samples: Sequence[Sample], function: LossFn) -> Any:
    """Run the policy over the student's prompts and completions and call `function` on the result;
    see Policy.run."""
    prompts = [sample.student_prompt for sample in samples]
    return policy.run(prompts, [sample.completion for sample in samples], function)


def head_options(head: LmHead) -> dict[str, Any]:
    """The head's options to an opsd_kernels loss with one head."""
    trained = head.weight.requires_grad
    return {
        "bias": head.bias,
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "workspace_bytes": workspace_bytes(head.weight.device, trained),
    }


def pair_options(student: LmHead, teacher: LmHead, temperature: float) -> dict[str, Any]:
    """The options to an opsd_kernels loss with two heads.

    Heads that are padded to different sizes are compared over the rows that both have.
    """
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
