"""Plain PyTorch: full logits and an fp32 softmax, eager and with torch.compile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.losses.cases import TOP_K
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.truth import BETA


def loss(x: Inputs) -> Tensor:
    """The mean loss, eager."""
    return _loss(x.case.operation, *_tensors(x))


def compiled(x: Inputs) -> Tensor:
    """The mean loss through torch.compile."""
    return _compiled()(x.case.operation, *_tensors(x))


def _tensors(x: Inputs) -> tuple[Tensor, ...]:
    return x.student, x.head, x.teacher, x.teacher_head, x.labels, x.upstream


def _loss(
    operation: str,
    student: Tensor,
    head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    upstream: Tensor,
) -> Tensor:
    z = F.linear(student, head).float()
    if operation == "cross_entropy":
        return F.cross_entropy(z, labels)
    log_s = z.log_softmax(-1)
    if operation == "largest":
        return -log_s.topk(TOP_K).values.mean()
    logprob = log_s.gather(-1, labels[:, None]).squeeze(-1)
    if operation == "logprob":
        # Entropy as a metric, as in a GRPO step; used, so that a compiler cannot remove it.
        entropy = -(log_s.detach().exp() * log_s.detach()).sum(-1)
        return -(upstream * logprob).mean() + 0 * entropy.mean()
    log_t = F.linear(teacher, teacher_head).float().log_softmax(-1)
    if operation == "advantage":
        advantage = log_t.gather(-1, labels[:, None]).squeeze(-1) - logprob.detach()
        return -(advantage * logprob).mean()
    if operation == "topk":
        log_t, ids = log_t.topk(TOP_K)
        log_s, log_t = with_rest(log_s.gather(-1, ids)), with_rest(log_t)
        return divergence(log_s, log_t, 0.0).mean()
    return divergence(log_s, log_t, BETA[operation]).mean()


def with_rest(logprob: Tensor) -> Tensor:
    """(N, K + 1): the log-probability of all other entries after those of K."""
    rest = torch.log1p(-logprob.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    return torch.cat([logprob, rest], -1)


def divergence(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """(N,) generalised JSD of (N, V) log-probabilities; beta 0 is forward KL, 1 reverse KL."""
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    to_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    return beta * to_teacher + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Created on the first call: torch.compile takes seconds to load."""
    return torch.compile(_loss, fullgraph=True, dynamic=False)
