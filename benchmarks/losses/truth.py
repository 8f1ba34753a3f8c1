"""The truth that answers are compared with: float64 over full logits, block of rows by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.losses.cases import TOP_K
from benchmarks.losses.inputs import Inputs
from opsd_kernels import reference

BETA = {"jsd": 0.5, "forward_kl": 0.0, "reverse_kl": 1.0}
# At most so many logits are computed in float64; of more tokens a part is checked.
_CPU_ELEMENTS, _GPU_ELEMENTS = 256 * 49152, 2**29
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
# Elements of a head in float64 at a time: a whole head is 5 GB, and several processes run.
_HEAD_ELEMENTS = 2**26
_WEIGHT_ROWS = 64


@dataclass
class Truth:
    """Loss and gradients; `grad_weight` has the rows `entries` of the head's gradient only."""

    loss: float
    grad_hidden: Tensor
    grad_weight: Tensor | None
    entries: Tensor


def checked_tokens(x: Inputs) -> Tensor:
    """Indices of the tokens to check, spread evenly over all tokens."""
    tokens, vocab = x.student.shape[0], x.head.shape[0]
    limit = _GPU_ELEMENTS if x.student.device.type == "cuda" else _CPU_ELEMENTS
    count = min(tokens, max(1, limit // vocab))
    return torch.linspace(0, tokens - 1, count, device=x.student.device).long()


def truth(x: Inputs) -> Truth:
    """The mean loss over x's tokens and its gradients."""
    tokens, vocab = x.student.shape[0], x.head.shape[0]
    head, teacher_head = x.head.detach(), x.teacher_head
    labelled = x.labels.unique()[: _WEIGHT_ROWS // 2]
    spread = torch.linspace(0, vocab - 1, _WEIGHT_ROWS // 2, device=head.device).long()
    entries = torch.cat([labelled, spread]).unique()
    grad_hidden = torch.zeros(x.student.shape, dtype=torch.float64, device=head.device)
    grad_weight = grad_hidden.new_zeros(len(entries), head.shape[1])
    loss = 0.0
    size = max(1, _BLOCK_ELEMENTS[head.device.type] // vocab)
    for rows in torch.arange(tokens, device=head.device).split(size):
        hidden = x.student.detach()[rows].double()
        z = _logits(hidden, head).requires_grad_()
        z_t = None if x.case.models == 1 else _logits(x.teacher[rows].double(), teacher_head)
        value = _values(x, rows, z, z_t).sum() / tokens
        (grad,) = torch.autograd.grad(value, z)
        loss += value.item()
        grad_hidden[rows] = _to_hidden(grad, head)
        grad_weight += grad[:, entries].T @ hidden
    return Truth(loss, grad_hidden, grad_weight if x.case.trained else None, entries)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    return torch.cat([hidden @ part.double().T for part in _parts(head)], dim=1)


def _to_hidden(grad: Tensor, head: Tensor) -> Tensor:
    parts = _parts(head)
    slices = grad.split([len(part) for part in parts], dim=1)
    return sum(dz @ part.double() for dz, part in zip(slices, parts, strict=True))


def _parts(head: Tensor) -> tuple[Tensor, ...]:
    return head.split(max(1, _HEAD_ELEMENTS // head.shape[1]))


def _values(x: Inputs, rows: Tensor, z: Tensor, z_t: Tensor | None) -> Tensor:
    """The loss of each token."""
    log_s, labels = z.log_softmax(-1), x.labels[rows]
    if x.case.operation in BETA:
        return reference.divergence(log_s, z_t.log_softmax(-1), BETA[x.case.operation])
    if x.case.operation == "cross_entropy":
        return reference.cross_entropy(log_s, labels)
    if x.case.operation == "largest":
        return -log_s.topk(TOP_K).values.mean(-1)
    if x.case.operation == "topk":
        log_t, ids = z_t.log_softmax(-1).topk(TOP_K)
        both = log_s.gather(-1, ids), log_t
        student, teacher = (
            torch.cat([y, torch.log1p(-y.exp().sum(-1, keepdim=True))], -1) for y in both
        )
        return reference.divergence(student, teacher, 0.0)
    logprob = reference.logprob(log_s, labels)
    if x.case.operation == "logprob":
        return -x.upstream[rows].double() * logprob
    advantage = reference.advantage(log_s, z_t.log_softmax(-1), labels).detach()
    return -advantage * logprob
