"""The losses as functions that torch.compile takes, and what compares them with eager ones."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import FusedLinearJSD, fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.sparse_divergence import topk_divergence
from opsd_kernels.testing import cast, make_pair
from tests.helpers.kernel_cases import STUDENT, run, workspace_for

FROZEN = STUDENT[:1]


WORKSPACE = workspace_for(7, 24, 12, 60)


def flat(result: object) -> tuple[Tensor, ...]:
    """Loss, tuple of tensors, and statistics as one tuple, so that every output is compared."""
    parts = result if isinstance(result, tuple) else (result,)
    tensors: list[Tensor] = []
    for part in parts:
        tensors.extend(part.values() if isinstance(part, dict) else [part])
    return tuple(tensors)


def student(pair: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return pair["student_input"], pair["student_weight"], pair["shift_labels"]


def jsd(**p: Tensor) -> object:
    return flat(fused_linear_jsd(**p))


def jsd_none_stats(**p: Tensor) -> object:
    return flat(
        fused_linear_jsd(**p, beta=0.1, reduction="none", token_clip=0.05, return_stats=True)
    )


def jsd_options(**p: Tensor) -> object:
    weight = torch.linspace(0, 1, p["student_input"].shape[0])
    options = {"token_weight": weight, "vocab_size": 60, "num_tokens": 50, "temperature": 1.3}
    options |= {"student_logit_scale": 4.0, "teacher_logit_scale": 0.0625}
    return flat(fused_linear_jsd(**p, student_softcap=9.0, workspace_bytes=WORKSPACE, **options))


def jsd_tensor_divisor(**p: Tensor) -> object:
    return flat(fused_linear_jsd(**p, num_tokens=(p["shift_labels"] != -100).sum() + 7))


def forward_kl(**p: Tensor) -> object:
    return flat(fused_linear_forward_kl(**p, reduction="sum"))


def reverse_kl(**p: Tensor) -> object:
    return flat(fused_linear_reverse_kl(**p, reduction="none"))


def logprob(**p: Tensor) -> object:
    return flat(fused_linear_logprob(*student(p), bias=p["student_bias"]))


def logprob_entropy_stats(**p: Tensor) -> object:
    options = {"return_entropy": True, "return_stats": True}
    return flat(fused_linear_logprob(*student(p), bias=p["student_bias"], **options))


def logprob_targets(**p: Tensor) -> object:
    hidden, weight, label = student(p)
    ids = torch.stack([label, (label + 9).remainder(60), (label + 30).remainder(60)], 1)
    ids = torch.where(label.unsqueeze(1) == -100, -100, ids)
    options = {"softcap": 9.0, "return_lse": True, "return_stats": True}
    return flat(fused_linear_logprob(hidden, weight, ids, bias=p["student_bias"], **options))


def top_k(**p: Tensor) -> object:
    teacher = p["teacher_input"], p["teacher_weight"]
    how = {"vocab_size": 60, "shift_labels": p["shift_labels"]}
    teacher_logprob, ids, _ = fused_linear_topk(*teacher, 6, bias=p["teacher_bias"], **how)
    hidden, weight, _ = student(p)
    student_logprob = fused_linear_logprob(hidden, weight, ids, bias=p["student_bias"])
    return topk_divergence(student_logprob, teacher_logprob, 0.3), student_logprob, ids


def cross_entropy(**p: Tensor) -> object:
    options = {"label_smoothing": 0.1, "logit_scale": 0.125, "return_stats": True}
    return flat(fused_linear_cross_entropy(*student(p), bias=p["student_bias"], **options))


def sampled_token_loss(**p: Tensor) -> object:
    target = p.pop("shift_labels")
    advantage, chosen = fused_linear_advantage(**p, target=target)
    return policy_gradient_loss(advantage, chosen, target), advantage, chosen


MODULE = FusedLinearJSD(jsd_beta=0.9, temperature=0.8)


def module(**p: Tensor) -> object:
    return flat(MODULE(**p))


FUNCTIONS = [
    jsd,
    jsd_none_stats,
    jsd_options,
    jsd_tensor_divisor,
    forward_kl,
    reverse_kl,
    logprob,
    logprob_entropy_stats,
    logprob_targets,
    top_k,
    cross_entropy,
    sampled_token_loss,
    module,
]


def equal_bits(
    fn: Callable, compiled: Callable, pair: dict[str, Tensor], wrt: tuple[str, ...]
) -> None:
    eager, eager_grads = run(fn, pair, wrt)
    ours, our_grads = run(compiled, pair, wrt)
    for i, (a, b) in enumerate(zip(ours, eager, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), f"output {i}"
        assert a.requires_grad == b.requires_grad, f"output {i}"
    for name in wrt:
        assert our_grads[name].dtype == eager_grads[name].dtype
        assert torch.equal(our_grads[name], eager_grads[name]), name


def case(tokens: int = 24, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    pair = make_pair(tokens, 12, 70, masked=3)
    pair["shift_labels"] = pair["shift_labels"].clamp(max=59)
    return cast(pair, dtype)


class Recorder(TorchDispatchMode):
    """Keeps the calls of a namespace's operators, by default this package's; None keeps all."""

    def __init__(self, namespace: str | None = "opsd_kernels") -> None:
        super().__init__()
        self.namespace, self.calls = namespace, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.namespace in (None, func.namespace):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
