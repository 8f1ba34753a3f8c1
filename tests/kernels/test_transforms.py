"""Derivatives that the losses do not have are refused in one line, where zeros would be silent."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import opsd_kernels as k
from opsd_kernels.testing import assert_close, make_pair

P = make_pair(5, 6, 11)
BOTH = (P["student_weight"], P["teacher_input"], P["teacher_weight"])
LABEL = P["shift_labels"]
LOSSES = {
    "jsd": lambda h, w: k.fused_linear_jsd(h, w, *BOTH[1:]),
    "jsd per token": lambda h, w: k.fused_linear_jsd(h, w, *BOTH[1:], LABEL, reduction="none"),
    "forward kl": lambda h, w: k.fused_linear_forward_kl(h, w, *BOTH[1:]),
    "reverse kl": lambda h, w: k.fused_linear_reverse_kl(h, w, *BOTH[1:]),
    "module": lambda h, w: k.FusedLinearJSD()(h, w, *BOTH[1:]),
    "cross-entropy": lambda h, w: k.fused_linear_cross_entropy(h, w, LABEL),
    "logprob": lambda h, w: k.fused_linear_logprob(h, w, LABEL),
    "entropy": lambda h, w: k.fused_linear_logprob(h, w, LABEL, return_entropy=True)[1],
    "advantage": lambda h, w: k.fused_linear_advantage(h, w, *BOTH[1:], LABEL)[1],
}


def jvp_of(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(fn, (x,), (torch.ones_like(x),))[1]


def dual(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def compiled(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.compile(lambda y: jvp_of(fn, y), backend="eager")(x)


TRANSFORMS = {
    "jvp": jvp_of,
    "dual": dual,
    "jacfwd": lambda fn, x: torch.func.jacfwd(fn)(x),
    "grad": lambda fn, x: torch.func.grad(lambda y: fn(y).sum())(x),
    "vjp": lambda fn, x: torch.func.vjp(fn, x),
    "jacrev": lambda fn, x: torch.func.jacrev(fn)(x),
    "hessian": lambda fn, x: torch.func.hessian(fn)(x),
    "vmap of grad": lambda fn, x: torch.func.vmap(torch.func.grad(lambda y: fn(y).sum()))(x[None]),
    "jvp of vmap": lambda fn, x: jvp_of(torch.func.vmap(fn), x[None]),
    "gradient through vmap": lambda fn, x: torch.func.vmap(fn)(x[None].requires_grad_()),
}


# Every transform of torch.func on every loss.
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_refused(name: str, transform: str) -> None:
    h, w, loss = P["student_input"], P["student_weight"], LOSSES[name]
    for fn, x in ((lambda x: loss(x, w), h), (lambda x: loss(h, x), w)):
        with pytest.raises(RuntimeError, match="fused losses do not support") as caught:
            TRANSFORMS[transform](fn, x.clone())
        message = str(caught.value)
        assert "\n" not in message and len(message) < 200
        assert ("input" if x is h else "weight") in message and "backward()" in message


def test_refused_under_compile() -> None:
    torch.compiler.reset()
    for transform in (compiled, lambda fn, x: jvp_of(torch.compile(fn, backend="eager"), x)):
        with pytest.raises(RuntimeError, match="fused losses do not support"):
            transform(lambda x: LOSSES["jsd"](x, P["student_weight"]), P["student_input"])


def test_a_constant_of_the_loss_is_refused_too() -> None:
    weight = torch.rand(5)
    with pytest.raises(RuntimeError, match="token_weight"):
        jvp_of(lambda x: k.fused_linear_jsd(**P, token_weight=x), weight)


def test_vmap_without_gradients() -> None:
    h = torch.stack([P["student_input"], 2 * P["student_input"]])
    ours = torch.func.vmap(lambda x: LOSSES["cross-entropy"](x, P["student_weight"]))(h)
    plain = torch.stack([F.cross_entropy(x @ P["student_weight"].T, LABEL) for x in h])
    assert_close(ours, plain)


def test_policy_gradient_loss_has_them_all() -> None:
    """It is plain PyTorch on values per token."""
    advantage, chosen = torch.randn(2, 5, dtype=torch.float64)
    fn = lambda x: k.policy_gradient_loss(advantage, x, LABEL)  # noqa: E731
    right = -advantage / 5
    assert_close(jvp_of(fn, chosen), right.sum())
    assert_close(torch.func.grad(fn)(chosen), right)
    assert_close(torch.func.jacfwd(fn)(chosen), right)
