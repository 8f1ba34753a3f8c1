"""fp32 errors over a deep product are no larger than plain PyTorch's, on either CPU backend."""

import pytest
import torch
from torch import Tensor

from opsd_kernels import fused_linear_jsd, fused_linear_logprob, reference

N, V = 96, 768


def losses(hidden: Tensor, weight: Tensor, other: Tensor, target: Tensor, plain: bool) -> Tensor:
    """(2, N): log-probabilities and JSD."""
    if plain:
        logprob = reference.linear_logprob(hidden, weight, target)
        jsd = reference.linear_jsd(hidden, weight, other, weight, reduction="none")
    else:
        logprob = fused_linear_logprob(hidden, weight, target)
        jsd = fused_linear_jsd(hidden, weight, other, weight, reduction="none")
    return torch.stack([logprob, jsd])


def rms(found: Tensor, truth: Tensor) -> Tensor:
    return (found.double() - truth).square().mean(-1).sqrt()


# Above, at and just beyond the parts that a product is cut into, and the widths of real models.
@pytest.mark.parametrize("depth", [256, 257, 1000, 1024, 4096])
def test_errors_are_those_of_pytorch(depth: int, cpu_backend: str) -> None:
    torch.manual_seed(depth)
    hidden, other = torch.randn(2, N, depth)
    weight = torch.randn(V, depth) * 3 / depth**0.5  # logits of about 3
    target = torch.randint(V, (N,))
    upstream = torch.randn(2, N)
    values, grads = [], []
    for dtype, plain in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        h = hidden.to(dtype).requires_grad_()
        value = losses(h, weight.to(dtype), other.to(dtype), target, plain)
        (grad,) = torch.autograd.grad((value * upstream).sum(), h)
        values.append(value.detach())
        grads.append(grad.flatten())
    for truth, own, ours in (values, grads):
        error, allowed = rms(ours, truth), 1.5 * rms(own, truth) + 1e-8
        assert (error < allowed).all(), f"{error.tolist()} over {allowed.tolist()}"
