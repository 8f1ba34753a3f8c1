"""Divergences against float64 autograd on full logits: values and gradients, alone and together."""

import functools

import pytest
import torch

from opsd_kernels import reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.testing import make_pair, random_upstream
from tests.helpers.kernel_cases import ALONE_AND_TOGETHER, STUDENT, check, run

pytestmark = pytest.mark.usefixtures("cpu_backend")

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
DTYPES = [torch.float32, torch.float64]


# Both ends of beta, near them and between; temperatures on either side of 1.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("beta", BETAS)
def test_beta_and_temperature(beta: float, temperature: float, dtype: torch.dtype) -> None:
    pair = make_pair(37, 19, 101, masked=5)
    options = {"beta": beta, "temperature": temperature, "reduction": "none"}
    check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, dtype=dtype, **options)


# A gradient asked for alone takes other branches than with the others; beta picks the formula.
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wrt", ALONE_AND_TOGETHER, ids="+".join)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients_alone_and_together(beta: float, wrt: tuple[str, ...], reduction: str) -> None:
    pair = make_pair(23, 17, 67, masked=3, seed=1)
    check(fused_linear_jsd, reference.linear_jsd, pair, wrt, beta=beta, reduction=reduction)


# One row, one column, less than a vector, primes, more than a block.
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (5, 8, 1), (33, 7, 257), (130, 64, 1003)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_odd_shapes(beta: float, shape: tuple[int, int, int]) -> None:
    pair = make_pair(*shape, seed=2)
    # A vocabulary of one has gradient 0, which plain PyTorch may hit exactly: float64 settles it.
    dtype = torch.float64 if shape[2] == 1 else torch.float32
    for reduction in ("none", "mean"):
        check(
            fused_linear_jsd,
            reference.linear_jsd,
            pair,
            STUDENT,
            dtype=dtype,
            beta=beta,
            reduction=reduction,
        )


# Heads with a cap each, and one of them without.
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("caps", [(4.0, 6.0), (4.0, None), (None, 6.0)])
def test_softcap(caps: tuple[float | None, float | None], beta: float) -> None:
    options = {"student_softcap": caps[0], "teacher_softcap": caps[1], "temperature": 1.2}
    pair = make_pair(21, 12, 83, seed=3, teacher_hidden=20)
    for dtype in DTYPES:
        check(
            fused_linear_jsd,
            reference.linear_jsd,
            pair,
            STUDENT,
            dtype=dtype,
            beta=beta,
            reduction="none",
            **options,
        )


@pytest.mark.parametrize("bias", [(), ("student_bias",), ("teacher_bias",)])
def test_without_biases(bias: tuple[str, ...]) -> None:
    pair = make_pair(21, 12, 83, seed=4)
    pair = {k: v for k, v in pair.items() if not k.endswith("bias") or k in bias}
    wrt = tuple(name for name in STUDENT if name in pair)
    check(fused_linear_jsd, reference.linear_jsd, pair, wrt, beta=0.5, reduction="none")


@pytest.mark.parametrize(
    ("fn", "beta"), [(fused_linear_forward_kl, 0.0), (fused_linear_reverse_kl, 1.0)]
)
def test_named_kls(fn: object, beta: float) -> None:
    pair = make_pair(21, 12, 83, seed=5, masked=2)
    options = {"temperature": 1.3, "token_clip": 0.05, "student_softcap": 9.0, "reduction": "sum"}
    check(fn, functools.partial(reference.linear_jsd, beta=beta), pair, STUDENT, **options)


# Frozen and trained heads treat the upstream gradient in different places.
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("wrt", [STUDENT[:1], STUDENT])
def test_rows_of_zero_upstream_get_zero_gradient(wrt: tuple[str, ...], beta: float) -> None:
    pair = make_pair(31, 12, 83, seed=6)
    upstream = random_upstream((31,))
    _, grads = run(fused_linear_jsd, pair, wrt, [upstream], beta=beta, reduction="none")
    assert (grads["student_input"][upstream == 0] == 0).all()
    assert (grads["student_input"][upstream != 0] != 0).any(1).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", [STUDENT[:1], STUDENT])
def test_second_backward_gives_the_same_gradient(names: tuple[str, ...], reduction: str) -> None:
    """A gradient kept from the forward pass must not be scaled in place."""
    pair = make_pair(15, 12, 83, seed=7)
    leaves = [pair[name].requires_grad_() for name in names]
    loss = fused_linear_jsd(**pair, reduction=reduction)
    upstream = torch.full_like(loss, 0.5)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [x.clone() for x in first]
    again = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    other = torch.autograd.grad(loss, leaves, 2 * upstream)
    for a, b, c, d in zip(first, kept, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
        torch.testing.assert_close(d, 2 * b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", [STUDENT[:1], STUDENT])
def test_second_derivatives_are_refused(names: tuple[str, ...], reduction: str) -> None:
    """A gradient made in the forward pass would be a constant to autograd, silently."""
    pair = make_pair(5, 3, 7)
    leaves = [pair[name].requires_grad_() for name in names]
    loss = fused_linear_jsd(**pair, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_inputs_stay_as_they_were_and_teacher_gets_nothing() -> None:
    pair = make_pair(15, 12, 83, seed=8)
    before = {k: v.clone() for k, v in pair.items()}
    leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in pair.items()}
    fused_linear_jsd(**leaves).backward()
    for name, value in before.items():
        assert torch.equal(leaves[name], value), name
        assert (leaves[name].grad is not None) == (name in STUDENT), name
