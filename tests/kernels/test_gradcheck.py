"""Finite differences in float64: needs no reference at all."""

import functools

import pytest
import torch
from torch import Tensor

from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import make_pair


def leaves(seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    pair = make_pair(5, 3, 7, std=1.0, masked=1, seed=seed)
    return pair, [pair[f"student_{x}"].requires_grad_() for x in ("input", "weight", "bias")]


# Each option bends the gradient in its own way; beta picks the formula.
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"student_softcap": 3.0, "student_logit_scale": 1.7, "teacher_logit_scale": 0.4},
        {"temperature": 0.7, "token_clip": 0.1},
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence(beta: float, extra: dict, reduction: str) -> None:
    pair, wrt = leaves(0)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        arguments = {**pair, "student_input": h, "student_weight": w, "student_bias": b}
        return fused_linear_jsd(**arguments, beta=beta, reduction=reduction, **extra)

    assert torch.autograd.gradcheck(loss, wrt)


@pytest.mark.parametrize(
    "fn",
    [
        fused_linear_logprob,
        functools.partial(fused_linear_logprob, return_entropy=True, softcap=3.0, logit_scale=0.6),
        functools.partial(fused_linear_cross_entropy, label_smoothing=0.2, temperature=0.7),
        functools.partial(fused_linear_cross_entropy, reduction="none"),
    ],
)
def test_one_distribution(fn: functools.partial) -> None:
    pair, wrt = leaves(1)
    assert torch.autograd.gradcheck(lambda h, w, b: fn(h, w, pair["shift_labels"], bias=b), wrt)


def test_sampled_token_loss() -> None:
    """The advantage is a constant of the loss: computed once, outside the finite differences."""
    pair, wrt = leaves(2)
    pair["target"] = pair.pop("shift_labels")
    advantage, _ = fused_linear_advantage(**pair)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        arguments = {**pair, "student_input": h, "student_weight": w, "student_bias": b}
        _, logprob = fused_linear_advantage(**arguments)
        return policy_gradient_loss(advantage, logprob, pair["target"])

    assert torch.autograd.gradcheck(loss, wrt)
