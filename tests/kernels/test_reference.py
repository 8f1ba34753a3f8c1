"""The truth itself: closed-form gradients against autograd, values against PyTorch's own losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.testing import assert_close

NEG_INF = float("-inf")
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def logits_pair(banned: str = "none", seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (3 * torch.randn(2, 7, 13, generator=g, dtype=torch.float64)).unbind()
    if banned in ("student", "both"):
        z_s[:, 2] = NEG_INF
        z_s[3, 5:9] = NEG_INF
    if banned in ("teacher", "both"):
        z_t[:, 2] = NEG_INF
        z_t[3, 5:9] = NEG_INF
    return z_s, z_t


def finite_case(beta: float, banned: str, clip: float | None) -> bool:
    """An unclipped KL is infinite when only the one in its denominator bans an entry."""
    return clip is not None or (beta, banned) not in {(0.0, "student"), (1.0, "teacher")}


# Where a ban makes a term infinite autograd has NaN, and the closed form must say 0.
@pytest.mark.parametrize("clip", [None, 0.5, 0.05, 1e-4])
@pytest.mark.parametrize("banned", ["none", "student", "teacher", "both"])
@pytest.mark.parametrize("beta", BETAS)
def test_divergence_gradients_equal_autograd(beta: float, banned: str, clip: float | None) -> None:
    z_s, z_t = logits_pair(banned)
    z_s.requires_grad_()
    lt = z_t.log_softmax(-1)
    value = reference.divergence(z_s.log_softmax(-1), lt, beta, clip)
    if not finite_case(beta, banned, clip):
        assert value.isposinf().all()
        return
    (dz,) = torch.autograd.grad(value.sum(), z_s)
    assert value.isfinite().all()
    assert_close(reference.divergence_grad(z_s.log_softmax(-1), lt, beta, clip), dz, floor=1e-13)


@pytest.mark.parametrize("banned", ["none", "student"])
def test_logprob_family_gradients_equal_autograd(banned: str) -> None:
    z, _ = logits_pair(banned)
    z.requires_grad_()
    y = torch.tensor([0, 1, 3, 12, 4, 10, 11])
    ls = z.log_softmax(-1)
    for value, closed in [
        (reference.logprob(ls, y), reference.logprob_grad(ls, y)),
        (reference.entropy(ls), reference.entropy_grad(ls)),
        (reference.cross_entropy(ls, y), reference.cross_entropy_grad(ls, y)),
    ]:
        (dz,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        assert_close(closed, dz, floor=1e-13)


def test_smoothed_cross_entropy_gradient_equals_autograd() -> None:
    z = logits_pair()[0].requires_grad_()
    y = torch.arange(7)
    ls = z.log_softmax(-1)
    (dz,) = torch.autograd.grad(reference.cross_entropy(ls, y, 0.2).sum(), z)
    assert_close(reference.cross_entropy_grad(ls, y, 0.2), dz, floor=1e-13)


def test_values_equal_torch_losses() -> None:
    z_s, z_t = logits_pair()
    ls, lt = z_s.log_softmax(-1), z_t.log_softmax(-1)
    y = torch.tensor([0, 1, -100, 12, -100, 10, 11])
    kl = F.kl_div(ls, lt, log_target=True, reduction="none").sum(-1)
    assert_close(reference.forward_kl(ls, lt), kl, floor=1e-13)
    kl = F.kl_div(lt, ls, log_target=True, reduction="none").sum(-1)
    assert_close(reference.reverse_kl(ls, lt), kl, floor=1e-13)
    m = 0.3 * lt.exp() + 0.7 * ls.exp()
    mixed = 0.3 * (lt.exp() * (lt - m.log())).sum(-1) + 0.7 * (ls.exp() * (ls - m.log())).sum(-1)
    assert_close(reference.jsd(ls, lt, 0.3), mixed, floor=1e-13)
    assert_close(
        reference.entropy(ls), torch.distributions.Categorical(logits=z_s).entropy(), floor=1e-13
    )
    eye = torch.eye(13, dtype=torch.float64)
    for smoothing in (0.0, 0.1, 1.0):
        ours = reference.linear_cross_entropy(z_s, eye, y, label_smoothing=smoothing)
        assert_close(ours, F.cross_entropy(z_s, y, label_smoothing=smoothing), floor=1e-13)


def test_scale_softcap_temperature_and_bias() -> None:
    g = torch.Generator().manual_seed(3)
    h, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in [(4, 5), (6, 5), (6,)])
    z = reference.logits(h, w, b, logit_scale=3.0, softcap=2.0, temperature=0.7)
    expected = [
        [2 * math.tanh(3 * (h[i] @ w[j] + b[j]).item() / 2) / 0.7 for j in range(6)]
        for i in range(4)
    ]
    assert_close(z, torch.tensor(expected, dtype=torch.float64), floor=1e-13)


def test_the_wrong_beta_gradient_differs() -> None:
    """(1 - beta)(s - m) stands in public code; the truth must be able to tell."""
    z_s, z_t = logits_pair()
    ls, lt = z_s.log_softmax(-1), z_t.log_softmax(-1)
    wrong = 0.5 * (ls.exp() - reference.log_mixture(ls, lt, 0.5).exp())
    with pytest.raises(AssertionError, match="worst at"):
        assert_close(wrong, reference.jsd_grad(ls, lt, 0.5), floor=0.05)
