"""The contenders: the floor, ours, and every peer with what it needs to run.

A contender computes the mean loss over tokens from hidden states and heads. `contenders(case)`
lists those that implement the case's operation; `why_not` says why one cannot run here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.losses import eager, peers
from benchmarks.losses.cases import TOP_K, Case
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.truth import BETA
from opsd_kernels import (
    Plan,
    fused_linear_advantage,
    fused_linear_cross_entropy,
    fused_linear_jsd,
    fused_linear_logprob,
    fused_linear_topk,
    plan,
    policy_gradient_loss,
    topk_divergence,
)
from opsd_kernels.ops.common import backend_name
from opsd_kernels.plan import PRECISIONS, SCHEDULES

FLOOR = "bare GEMMs"
OURS = "opsd_kernels"
SHARED = f"{OURS}, shared head"
# The floor runs its products in blocks of rows whose logits take at most so many bytes.
_FLOOR_BYTES = 2**30

# Schedules and MiB of workspace measured in addition to the default.
WORKSPACES = (("tiled", 64), ("blocked", 1024), ("blocked", 2048))

Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """`role` is "floor", "ours" or "peer"; `logits` is the number of (N, V) tensors it holds."""

    name: str
    role: str
    call: Call
    package: str | None = None
    needs_gpu: bool = False
    compiles: bool = False
    logits: int = 0

    def why_not(self, case: Case, device: torch.device, memory: int) -> str | None:
        """Why it cannot run the case on this device with `memory` bytes; None if it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.needs_gpu and device.type != "cuda":
            return "its Triton kernel needs a GPU"
        # Full logits are kept in fp32 by softmax and its gradient, whatever the inputs are.
        held = self.logits * case.tokens * case.shape.vocab * 4
        if held + case.input_bytes > 0.9 * memory:
            return f"needs about {held / 2**30:.0f} GiB for its logits"
        return None


def contenders(case: Case, device: torch.device) -> list[Contender]:
    """The floor first, then ours, then the peers."""
    return [Contender(FLOOR, "floor", floor), *_ours(case, device), *_peers(case)]


def _ours(case: Case, device: torch.device) -> list[Contender]:
    """The default plan, every other schedule and precision, and the shared head where it applies.

    On a GPU a divergence is also measured with the workspaces of WORKSPACES.
    """
    chosen = our_plan(case, device)
    found = [Contender(OURS, "ours", our_call)]
    for schedule, precision in ways(case, device):
        if (schedule, precision) != (chosen.schedule, chosen.precision):
            name = (
                f"{OURS}, {schedule}, {precision}"
                if case.operation in BETA
                else f"{OURS}, {schedule}"
            )
            call = partial(our_call, schedule=schedule, precision=precision)
            found.append(Contender(name, "ours", call))
    if case.operation in BETA and not case.trained:
        shared = partial(our_call, shared=True)
        found.append(Contender(SHARED, "ours", shared))
    if case.operation in BETA and device.type == "cuda":
        for schedule, mib in WORKSPACES:
            call = partial(our_call, schedule=schedule, workspace=mib * 2**20)
            found.append(Contender(f"{OURS}, {schedule}, {mib} MiB", "ours", call))
    return found


def ways(case: Case, device: torch.device) -> list[tuple[str, str]]:
    """Every (schedule, precision) but "auto" that runs the case on this device."""
    found = []
    for schedule, precision in product(SCHEDULES, PRECISIONS):
        if "auto" not in (schedule, precision):
            with suppress(ValueError):  # the plan says what a schedule or a precision needs
                chosen = our_plan(case, device, schedule, precision)
                if (chosen.schedule, chosen.precision) == (schedule, precision):
                    found.append((schedule, precision))
    return found


def our_plan(
    case: Case,
    device: torch.device,
    schedule: str = "auto",
    precision: str = "auto",
    workspace: int | None = None,
) -> Plan:
    """Our plan for the case, as the operators make it.

    Of "topk" the teacher's, but the student's with "streaming", which chooses no largest logits.
    Raises ValueError if it is not possible.
    """
    student_streams = case.operation == "topk" and schedule == "streaming"
    topk = case.operation in ("topk", "largest") and not student_streams
    return plan(
        case.tokens, case.shape.hidden, case.shape.vocab,
        loss="topk" if topk else "divergence" if case.operation in BETA else "logprob",
        k=TOP_K if topk else 0,
        dtype=case.torch_dtype, device=device,
        backend=backend_name(torch.empty(0, dtype=case.torch_dtype, device=device)),
        grad_input=case.differentiated, grad_weight=case.trained,
        reduced=case.operation in (*BETA, "cross_entropy"),
        two_passes=case.operation == "jsd", schedule=schedule, precision=precision,
        workspace_bytes=workspace,
    )  # fmt: skip


def our_call(
    x: Inputs,
    schedule: str = "auto",
    precision: str = "auto",
    shared: bool = False,
    workspace: int | None = None,
) -> Tensor:
    """Call our loss on x; `shared`: the teacher has the student's head.

    `precision` and `workspace` apply to divergences only.
    """
    operation = x.case.operation
    teacher = x.teacher, x.head if shared else x.teacher_head
    if operation in BETA:
        how = {"beta": BETA[operation], "schedule": schedule, "precision": precision}
        how["workspace_bytes"] = workspace
        return fused_linear_jsd(x.student, x.head, *teacher, **how)
    if operation == "cross_entropy":
        return fused_linear_cross_entropy(x.student, x.head, x.labels, schedule=schedule)
    if operation == "logprob":
        logprob, _ = fused_linear_logprob(
            x.student, x.head, x.labels, return_stats=True, schedule=schedule
        )
        return -(x.upstream * logprob).mean()
    if operation == "largest":
        return -fused_linear_topk(x.student, x.head, TOP_K, schedule=schedule)[0].mean()
    if operation == "topk":
        chooses = "auto" if schedule == "streaming" else schedule
        teacher_logprob, ids, _ = fused_linear_topk(*teacher, TOP_K, schedule=chooses)
        student_logprob = fused_linear_logprob(x.student, x.head, ids, schedule=schedule)
        return topk_divergence(student_logprob, teacher_logprob, beta=0.0).mean()
    advantage, logprob = fused_linear_advantage(
        x.student, x.head, *teacher, x.labels, schedule=schedule
    )
    return policy_gradient_loss(advantage, logprob)


def _peers(case: Case) -> list[Contender]:
    operation, liger = case.operation, "liger_kernel"
    found = [
        Contender("PyTorch eager", "peer", eager.loss, logits=4),
        Contender("torch.compile of eager", "peer", eager.compiled, compiles=True, logits=3),
    ]
    if operation in BETA:
        return [
            *found,
            Contender("TRL generalized_jsd_loss", "peer", peers.trl_jsd, "trl", logits=4),
            Contender("TRL ChunkedDivergenceFunction", "peer", peers.trl_divergence, "trl"),
            Contender("Liger FusedLinearJSD", "peer", peers.liger_jsd, liger, needs_gpu=True),
            Contender(
                "Liger chunked_loss JSD", "peer", peers.liger_chunked_jsd, liger, compiles=True
            ),
            Contender("unsloth_zoo fused_linear_jsd", "peer", peers.unsloth_jsd, "unsloth_zoo"),
        ]
    if operation == "largest":
        return [
            *found,
            Contender("topk, logsumexp, as in TRL's SDFT", "peer", peers.largest, logits=2),
        ]
    if operation == "topk":
        return [
            *found,
            Contender("TRL server distillation's top-k", "peer", peers.trl_topk, "trl", logits=4),
        ]
    if operation == "cross_entropy":
        return [
            *found,
            Contender("torch linear_cross_entropy", "peer", peers.torch_cross_entropy),
            Contender("TRL ChunkedLogProbFunction", "peer", peers.trl_cross_entropy, "trl"),
            Contender(
                "Liger FusedLinearCrossEntropy", "peer", peers.liger_ce, liger, needs_gpu=True
            ),
            Contender(
                "Cut Cross-Entropy", "peer", peers.cut_ce, "cut_cross_entropy", needs_gpu=True
            ),
            Contender(
                "quack chunked_linear_cross_entropy",
                "peer",
                peers.quack_ce,
                "quack",
                needs_gpu=True,
            ),
        ]
    eager_name = "TRL selective_log_softmax" + ("_and_entropy" if operation == "logprob" else "")
    return [
        *found,
        Contender(eager_name, "peer", peers.trl_eager_logprob, "trl", logits=3),
        Contender("TRL ChunkedLogProbFunction", "peer", peers.trl_logprob, "trl"),
    ]


def floor(x: Inputs) -> Callable[[], None]:
    """The bare matrix products: logits of each model, then those of the gradients.

    Runs the logits and returns a function that runs the backward half, which uses the first block's
    logits as dz of every block. All blocks together are `x.case.operations` operations.
    """
    tokens, vocab = x.student.shape[0], x.head.shape[0]
    size = max(1, _FLOOR_BYTES // (vocab * x.head.element_size()))
    blocks = [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]
    student, head = x.student.detach(), x.head.detach()
    kept = None  # the first block is the largest
    for block in blocks:
        logits = student[block] @ head.T
        kept = logits if kept is None else kept
        if x.case.models == 2:
            x.teacher[block] @ x.teacher_head.T

    def backward() -> None:
        for block in blocks:
            dz = kept[: block.stop - block.start]
            dz @ head
            if x.case.trained:
                dz.T @ student[block]

    return backward
