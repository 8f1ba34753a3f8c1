"""The peers' calls, as their documentation shows them. Each imports its package when called.

Every function takes the inputs and returns the mean loss.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.losses.cases import TOP_K
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.truth import BETA


def trl_jsd(x: Inputs) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = x.student @ x.head.T, x.teacher @ x.teacher_head.T
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETA[x.case.operation])


def trl_divergence(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = x.student, x.head, None, x.teacher, x.teacher_head, None
    divergence, _ = ChunkedDivergenceFunction.apply(*heads, BETA[x.case.operation])
    return divergence.mean()


def liger_jsd(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETA[x.case.operation])
    return loss(x.student, x.head, x.teacher, x.teacher_head, x.labels)


def liger_chunked_jsd(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    beta = BETA[x.case.operation]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    return loss(x.student, x.head, x.teacher, x.teacher_head, x.labels)


def unsloth_jsd(x: Inputs) -> Tensor:
    heads = x.student, x.head, x.teacher, x.teacher_head
    return _unsloth().fused_linear_jsd(*heads, beta=BETA[x.case.operation])


@functools.cache
def _unsloth() -> ModuleType:
    """unsloth_zoo's module, loaded by its path: its package needs unsloth and patches torch."""
    package = importlib.util.find_spec("unsloth_zoo")
    path = Path(package.submodule_search_locations[0], "fused_losses", "fused_linear.py")
    spec = importlib.util.spec_from_file_location("unsloth_zoo_fused_linear", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _trl_chunked(hidden: Tensor, head: Tensor, labels: Tensor, *outputs: str) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE  # as in TRL's trainers
    options = None, labels, 1.0, size, None, 1.0, outputs
    return ChunkedLogProbFunction.apply(hidden, head, *options)[0]


def trl_logprob(x: Inputs) -> Tensor:
    if x.case.operation == "logprob":
        return -(x.upstream * _trl_chunked(x.student, x.head, x.labels, "entropy")).mean()
    with torch.no_grad():
        teacher = _trl_chunked(x.teacher, x.teacher_head, x.labels)
    student = _trl_chunked(x.student, x.head, x.labels)
    return -((teacher - student.detach()) * student).mean()


def trl_topk(x: Inputs) -> Tensor:
    """What its trainer does with a server's top k, here taken from the teacher's full logits."""
    from trl.experimental.server_distillation import server_distillation_trainer as trl

    teacher_logprob = (x.teacher @ x.teacher_head.T).float().log_softmax(-1)
    teacher_logprob, ids = teacher_logprob.topk(TOP_K)
    student_logprob = (x.student @ x.head.T).float().log_softmax(-1).gather(-1, ids)
    valid = torch.ones_like(ids, dtype=torch.bool)
    student_logprob, support = trl._add_tail_bucket(student_logprob, valid)
    teacher_logprob, _ = trl._add_tail_bucket(teacher_logprob, valid)
    entries = trl._jsd_divergence(student_logprob, teacher_logprob, beta=0.0, support_mask=support)
    return entries.sum(-1).mean()


def largest(x: Inputs) -> Tensor:
    """TRL's SDFT does so inside its loss, in the logits' dtype."""
    logits = x.student @ x.head.T
    return -(logits.topk(TOP_K).values - logits.logsumexp(-1, keepdim=True)).mean()


def trl_cross_entropy(x: Inputs) -> Tensor:
    return -_trl_chunked(x.student, x.head, x.labels).mean()


def trl_eager_logprob(x: Inputs) -> Tensor:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    logits = x.student @ x.head.T
    if x.case.operation == "logprob":
        logprob, _ = selective_log_softmax_and_entropy(
            logits, x.labels, entropy_requires_grad=False
        )
        return -(x.upstream * logprob).mean()
    with torch.no_grad():
        teacher = selective_log_softmax(x.teacher @ x.teacher_head.T, x.labels)
    student = selective_log_softmax(logits, x.labels)
    return -((teacher - student.detach()) * student).mean()


def torch_cross_entropy(x: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x.student, x.head, x.labels, options=options)


def liger_ce(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(x.head, x.student, x.labels)


def cut_ce(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.student, x.head, x.labels)


def quack_ce(x: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x.student, x.head, x.labels)
