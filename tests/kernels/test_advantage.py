"""Sampled-token objective (Eq. 9): advantage, student log-probability, and the loss on top."""

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.testing import assert_close, make_pair
from tests.helpers.kernel_cases import STUDENT, check

pytestmark = pytest.mark.usefixtures("cpu_backend")

OPTIONS = {"temperature": 1.2, "student_softcap": 7.0, "teacher_softcap": 9.0}


def inputs(seed: int = 0) -> dict[str, Tensor]:
    pair = make_pair(31, 17, 71, masked=4, teacher_hidden=11, seed=seed)
    pair["target"] = pair.pop("shift_labels")
    return pair


# C++ computes fp32, PyTorch fp64; gradients asked for alone and together take other branches.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrt", [STUDENT[:1], STUDENT[1:], STUDENT], ids="+".join)
def test_advantage_and_logprob(wrt: tuple[str, ...], dtype: torch.dtype) -> None:
    check(fused_linear_advantage, reference.linear_advantage, inputs(), wrt, dtype=dtype, **OPTIONS)


def test_advantage_is_detached_and_masked_rows_are_zero() -> None:
    pair = inputs()
    pair["student_input"].requires_grad_()
    advantage, logprob = fused_linear_advantage(**pair)
    masked = pair["target"] == -100
    assert not advantage.requires_grad and logprob.requires_grad
    assert (advantage[masked] == 0).all() and (logprob[masked] == 0).all()
    assert (advantage[~masked] != 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_equals_equation_nine_on_full_logits(weighted: bool, reduction: str) -> None:
    """loss = -A log s(y), with A = log t(y) - log s(y) held constant."""
    pair = inputs(1)
    weight = torch.linspace(0, 2, 31, dtype=torch.float64) if weighted else None
    leaves = {k: v.clone().requires_grad_() if k in STUDENT else v for k, v in pair.items()}
    reduced = {"reduction": reduction, "token_weight": weight}
    advantage, logprob = fused_linear_advantage(**leaves)
    loss = policy_gradient_loss(advantage, logprob, leaves["target"], **reduced)
    grads = torch.autograd.grad(loss.sum(), [leaves[k] for k in STUDENT])

    truth_leaves = {k: v.clone().requires_grad_() if k in STUDENT else v for k, v in pair.items()}
    a, lp = reference.linear_advantage(**truth_leaves)
    truth = reference.reduce_tokens(-a * lp, pair["target"], **reduced)
    true_grads = torch.autograd.grad(truth.sum(), [truth_leaves[k] for k in STUDENT])
    assert_close(loss, truth)
    for name, ours, theirs in zip(STUDENT, grads, true_grads, strict=True):
        assert_close(ours, theirs, name=name)


def test_loss_divisors() -> None:
    g = torch.Generator().manual_seed(0)
    advantage, logprob = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    target = torch.tensor([[0, 1, -100, 2], [-100, 0, 0, 0], [3, 3, 3, -100]])
    product = -(advantage * logprob)
    kept = torch.where(target == -100, 0.0, product)
    assert_close(policy_gradient_loss(advantage, logprob), product.mean())
    assert_close(policy_gradient_loss(advantage, logprob, target), kept.sum() / 9)
    assert_close(policy_gradient_loss(advantage, logprob, target, num_tokens=20), kept.sum() / 20)
    assert_close(policy_gradient_loss(advantage, logprob, target, reduction="none"), kept)
    nothing = torch.full_like(target, -100)
    assert policy_gradient_loss(advantage, logprob, nothing).item() == 0.0


def test_loss_never_differentiates_the_advantage() -> None:
    advantage = torch.tensor([0.5, -2.0], requires_grad=True)
    logprob = torch.tensor([-1.0, -3.0], requires_grad=True)
    policy_gradient_loss(advantage, logprob, reduction="sum").backward()
    assert advantage.grad is None
    assert torch.equal(logprob.grad, -advantage.detach())
