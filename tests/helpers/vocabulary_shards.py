"""Shards of a vocabulary, their losses, and what compares them with the whole."""

import torch
import torch.distributed as dist
from torch import Tensor

import opsd_kernels as k
from opsd_kernels.testing import assert_close, cast, make_pair
from tests.helpers.kernel_cases import STUDENT

TOKENS, HIDDEN, VOCAB = 13, 8, 101


SIZES = {2: (60, 41), 3: (50, 1, 50)}


def losses(
    p: dict[str, Tensor], group: dist.ProcessGroup | None, schedule: str = "auto"
) -> list[Tensor]:
    """One loss of every kind; `p` holds whole heads or shards."""
    both = (p["student_input"], p["student_weight"], p["teacher_input"], p["teacher_weight"])
    one = both[:2]
    label, bias = p["shift_labels"], {"student_bias": p["student_bias"]}
    run = {"process_group": group, "schedule": schedule}
    clipped, stats = k.fused_linear_jsd(
        *both, label, **bias, **run, token_clip=0.01, student_softcap=20.0, return_stats=True
    )
    scaled = k.fused_linear_jsd(
        *both, label, **bias, **run, student_logit_scale=4.0, teacher_logit_scale=0.125
    )
    logprob, entropy = k.fused_linear_logprob(*one, label, **run, return_entropy=True)
    ids = torch.stack([label, (label + 41).remainder(VOCAB), (label + 60).remainder(VOCAB)], 1)
    ids = torch.where(label.unsqueeze(1) == -100, -100, ids)
    several, total = k.fused_linear_logprob(
        *one, ids, bias=p["student_bias"], **run, softcap=20.0, temperature=0.9, return_lse=True
    )
    lse = k.fused_linear_logprob(*one, label, **run, return_lse=True)[1]
    weighted, counts = k.fused_linear_cross_entropy(
        *one, label, **run, class_weight=torch.linspace(0, 2, VOCAB), label_smoothing=0.1,
        z_loss=0.01, return_stats=True,
    )  # fmt: skip
    advantage, sampled = k.fused_linear_advantage(*both, label, **run)
    return [
        k.fused_linear_jsd(*both, label, **bias, **run, beta=0.3, reduction="none").sum(),
        k.fused_linear_forward_kl(*both, label, **bias, **run),
        k.fused_linear_reverse_kl(*both, label, **bias, **run, temperature=1.3),
        clipped + sum(column.sum() for column in stats.values()),
        scaled,
        (2 * logprob + entropy).sum(),
        lse.sum(),
        (several * torch.tensor([1.0, -0.5, 0.3])).sum() + 0.2 * total.sum(),
        k.fused_linear_cross_entropy(*one, label, **run, label_smoothing=0.1),
        weighted + 0.01 * counts["predicted"].double().mean() + counts["accuracy"],
        k.policy_gradient_loss(advantage, sampled, label),
    ]


def inputs() -> dict[str, Tensor]:
    pair = make_pair(TOKENS, HIDDEN, VOCAB, masked=3, seed=11)
    return {
        name: value.double() if value.is_floating_point() else value for name, value in pair.items()
    }


def gradients(
    p: dict[str, Tensor], group: dist.ProcessGroup | None, schedule: str
) -> list[dict[str, Tensor]]:
    names = STUDENT[:2]
    leaves = {name: p[name].requires_grad_() for name in names}
    result = []
    for value in losses(p, group, schedule):
        grads = torch.autograd.grad(value, leaves.values())
        result.append({"value": value.detach(), **dict(zip(names, grads, strict=True))})
    return result


def compare_shards(shards: list[list[dict[str, Tensor]]]) -> None:
    """Each rank's values and gradients of each loss, against one process."""
    rounded = cast(inputs(), torch.float32)
    truths = gradients(cast(rounded, torch.float64), None, "auto")
    plains = gradients(rounded, None, "auto")  # blocked PyTorch in fp32
    for index, (truth, plain) in enumerate(zip(truths, plains, strict=True)):
        parts = [made[index] for made in shards]
        assert all(torch.equal(x["value"], parts[0]["value"]) for x in parts)
        whole = torch.cat([x["student_weight"] for x in parts])
        found = {**parts[0], "student_weight": whole}
        for name, true in truth.items():
            rule = {"max_factor": 4.0, "atol": TOKENS * 1e-6 if name == "value" else 0.0}
            assert_close(found[name], true, plain[name], **rule, name=f"{index} {name}")
