"""topk_divergence against the divergence of the whole vocabulary, and against what its rest is."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.sparse_divergence import topk_divergence

BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
TOKENS, VOCAB = (3, 4), 50


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*TOKENS, VOCAB, generator=g, dtype=torch.float64)).to(dtype)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Of probabilities, where 0 log 0 = 0."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def divergence(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Of probabilities, in words of torch alone."""
    if beta in (0.0, 1.0):
        return kl(t, s) if beta == 0.0 else kl(s, t)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def value_and_gradient(fn: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = fn(z)
    (grad,) = torch.autograd.grad(
        (value * torch.arange(1.0, 1 + value.numel()).view_as(value)).sum(), z
    )
    return value.detach(), grad


def largest(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return t.log_softmax(-1).topk(k, -1)


@BETAS
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "without"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_entries_are_the_whole_vocabulary(dtype: torch.dtype, tail: bool, beta: float) -> None:
    z, y = logits(0, dtype), logits(1, dtype)
    log_t, ids = largest(y, VOCAB)

    def sparse(z: Tensor) -> Tensor:
        return topk_divergence(z.log_softmax(-1).gather(-1, ids), log_t, beta, tail)

    def whole(z: Tensor) -> Tensor:
        return divergence(z.softmax(-1), y.double().softmax(-1), beta)

    ours = value_and_gradient(sparse, z)
    true = value_and_gradient(whole, z.double())
    assert ours[0].dtype == dtype and ours[0].shape == TOKENS
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert true[1].abs().max() > 0.1


@BETAS
@pytest.mark.parametrize("k", [1, 7, VOCAB - 1])
def test_the_rest_is_one_more_outcome(k: int, beta: float) -> None:
    z, y = logits(2), logits(3)
    log_t, ids = largest(y, k)
    t, rest = y.softmax(-1), torch.ones(*TOKENS, VOCAB, dtype=torch.bool).scatter(-1, ids, False)

    def merged(p: Tensor) -> Tensor:
        return torch.cat([p.gather(-1, ids), (p * rest).sum(-1, keepdim=True)], -1)

    def sparse(z: Tensor, tail: bool = True) -> Tensor:
        return topk_divergence(z.log_softmax(-1).gather(-1, ids), log_t, beta, tail)

    ours = value_and_gradient(sparse, z)
    true = value_and_gradient(lambda z: divergence(merged(z.softmax(-1)), merged(t), beta), z)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert (ours[0] <= divergence(z.softmax(-1), t, beta) + 1e-9).all()
    # Without a tail: the same sums without their last term.
    s, t = merged(z.softmax(-1)), merged(t)
    last = divergence(s[..., -1:], t[..., -1:], beta)
    torch.testing.assert_close(sparse(z, tail=False), true[0] - last, rtol=1e-9, atol=1e-11)


@BETAS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rests_of_zero(dtype: torch.dtype, beta: float) -> None:
    """Sums a rounding below, at and above 1, on either side or both."""
    eps = torch.finfo(dtype).eps
    half = math.log(0.5)
    sums = torch.tensor([-4 * eps, -eps, 0.0, eps, 4 * eps], dtype=dtype)
    one = torch.stack([half + sums, torch.full_like(sums, half)], -1)
    for log_s in one:
        for log_t in one:
            leaf = log_s.clone().requires_grad_()
            value = topk_divergence(leaf, log_t, beta)
            value.backward()
            assert abs(value.item()) < 50 * eps and leaf.grad.isfinite().all()
            plain = log_s.clone().requires_grad_()
            topk_divergence(plain, log_t, beta, tail=False).backward()
            if log_s.exp().sum() >= 1 and log_t.exp().sum() >= 1:  # the rest adds nothing
                assert torch.equal(leaf.grad, plain.grad)
    # A rest on one side alone: finite, and at least what the other terms make.
    some = torch.tensor([math.log(0.5), math.log(0.2)], dtype=dtype)
    for log_s, log_t in ((one[2], some), (some, one[2])):
        leaf = log_s.clone().requires_grad_()
        value = topk_divergence(leaf, log_t, beta)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()
        assert value > 0.05


@BETAS
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "without"])
def test_impossible_entries(tail: bool, beta: float) -> None:
    none = -math.inf
    log_s = torch.tensor([[0.5, 0.3, 0.0], [0.0, 0.0, 0.0], [0.6, 0.0, 0.2]]).double().log()
    log_t = torch.tensor([[0.7, 0.1, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.3]]).double().log()
    leaf = log_s.clone().requires_grad_()
    value = topk_divergence(leaf, log_t, beta, tail)
    value.sum().backward()
    assert leaf.grad.isfinite().all() and value.isfinite().all() and value[1] == 0
    s, t = log_s.exp(), log_t.exp()
    if tail:
        s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (s, t))
    torch.testing.assert_close(
        value.detach(), divergence(s.clamp(min=1e-300), t.clamp(min=1e-300), beta)
    )
    # Possible on one side alone: infinite for the KL that cannot do without, else finite.
    for a, b, infinite in (
        ([0.5, 0.0], [0.4, 0.1], beta == 0),
        ([0.4, 0.1], [0.5, 0.0], beta == 1),
    ):
        leaf = torch.tensor(a).double().log().requires_grad_()
        value = topk_divergence(leaf, torch.tensor(b).double().log(), beta, tail)
        value.backward()
        assert value.isinf() == infinite and not value.isnan()
        assert infinite or not leaf.grad.isnan().any()
    assert none == log_s[1, 0]


@BETAS
def test_made_of_the_two_operators(beta: float) -> None:
    """A teacher's whole vocabulary from fused_linear_topk gives what fused_linear_jsd gives."""
    g = torch.Generator().manual_seed(5)
    h_s, h_t = (torch.randn(9, 8, generator=g) for _ in range(2))
    w_s, w_t = (torch.randn(40, 8, generator=g) for _ in range(2))
    log_t, ids, _ = fused_linear_topk(h_t, w_t, 40)
    log_s = (h_s @ w_s.T).log_softmax(-1).gather(-1, ids)
    ours = topk_divergence(log_s, log_t, beta)
    true = fused_linear_jsd(h_s, w_s, h_t, w_t, beta=beta, reduction="none")
    torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)


def test_16_bits_are_widened_and_dropped_tokens_add_nothing() -> None:
    log_s, log_t = logits(6).log_softmax(-1), logits(7).log_softmax(-1)
    half = topk_divergence(log_s.bfloat16(), log_t.half(), 0.5)
    assert half.dtype == torch.float32
    wide = topk_divergence(log_s.bfloat16().float(), log_t.half().float(), 0.5)
    assert torch.equal(half, wide)
    nothing = torch.zeros(2, 5, requires_grad=True)
    for beta in (0.0, 0.5, 1.0):
        value = topk_divergence(nothing, nothing, beta)
        assert value.tolist() == [0.0, 0.0]


def test_compiled() -> None:
    log_s, log_t = logits(8).log_softmax(-1)[..., :7], logits(9).log_softmax(-1)[..., :7]
    torch._dynamo.reset()
    compiled = torch.compile(topk_divergence, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(log_s, log_t, 0.3), topk_divergence(log_s, log_t, 0.3))


@pytest.mark.parametrize(
    ("change", "word", "kind"),
    [
        ({"teacher_logprob": torch.zeros(2, 4)}, "teacher_logprob", ValueError),
        ({"teacher_logprob": torch.zeros(3)}, "teacher_logprob", ValueError),
        ({"student_logprob": torch.zeros(())}, "student_logprob", ValueError),
        ({"student_logprob": torch.zeros(2, 3, dtype=torch.long)}, "student_logprob", TypeError),
        ({"teacher_logprob": [0.0]}, "teacher_logprob", TypeError),
        ({"beta": 1.5}, "beta", ValueError),
        ({"beta": math.nan}, "beta", ValueError),
    ],
    ids=str,
)
def test_errors(change: dict[str, object], word: str, kind: type[Exception]) -> None:
    arguments = {"student_logprob": torch.zeros(2, 3), "teacher_logprob": torch.zeros(2, 3)}
    with pytest.raises(kind, match=word):
        topk_divergence(**{**arguments, "beta": 0.5, **change})
