"""The gradient of a trained head on a CPU: its product, one rounding, and who owns its memory."""

import sys

import pytest
import torch
from torch import Tensor

from opsd_kernels import extension, plan
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.testing import make_pair

built = pytest.mark.skipif(not extension.loaded(), reason="the C++ operators are not built")
BF16 = torch.bfloat16
# Rows, hidden size and vocabulary around what is transposed and multiplied at a time: 32, 64, 128.
SHAPES = [(1, 1, 1), (31, 64, 127), (32, 65, 128), (33, 63, 129), (70, 130, 300), (64, 128, 256)]


@built
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_of_any_shape(shape: tuple[int, int, int]) -> None:
    """Against fp64; rows of dz lie apart, and what lies between them is NaN."""
    rows, depth, vocab = shape
    wide = torch.full((rows, vocab + 7), torch.nan, dtype=BF16)
    dz, hidden = wide[:, :vocab], torch.randn(rows, depth, dtype=BF16)
    dz.copy_(torch.randn(rows, vocab))
    true = dz.double().t() @ hidden.double()
    limit = 1e-5 * true.abs().max()
    sums, out = torch.full(true.shape, torch.nan), torch.empty(true.shape, dtype=BF16)
    product = torch.ops.opsd_cpu.weight_gradient
    product(dz, hidden, sums, False, None)
    assert (sums - true).abs().max() <= limit
    product(dz, hidden, sums, True, None)
    assert (sums - 2 * true).abs().max() <= 2 * limit
    product(dz, hidden, sums, True, out)
    rounding = 2**-8 * true.abs()
    assert ((out - 3 * true).abs() <= 3 * (limit + rounding)).all()
    product(dz, hidden, None, False, out)
    assert ((out - true).abs() <= limit + rounding).all()


@built
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "blocks"), [(48, 1), (48, 3), (150, 3)])
def test_backward_again(dtype: torch.dtype, rows: int, blocks: int) -> None:
    """A kept graph gives the same gradient again; what the first gave is the caller's own.

    Of three blocks in bf16, dz of 48 rows waits for one product; products of 150 rows are added.
    """
    pair = make_pair(rows, 64, 300, dtype=dtype)
    hidden, weight = (pair[f"student_{x}"].requires_grad_() for x in ("input", "weight"))
    workspace = 300 * 4 * -(-rows // blocks)
    chosen = plan(rows, 64, 300, loss="logprob", dtype=dtype, grad_weight=True,
                  workspace_bytes=workspace)  # fmt: skip
    assert chosen.num_blocks == blocks
    if dtype == BF16 and extension.multiplies_bf16():
        waiting = {(48, 1): 0, (48, 3): 48 * 300 * 2, (150, 3): 300 * 64 * 4}
        assert chosen.accumulator_bytes == waiting[rows, blocks]
    labels = torch.arange(rows)

    def gradient(upstream: float, times: int) -> list[Tensor]:
        loss = fused_linear_cross_entropy(hidden, weight, labels, workspace_bytes=workspace)
        found = []
        for i in range(times):
            weight.grad = None
            (upstream * loss).backward(retain_graph=i + 1 < times)
            found.append(weight.grad)
            if i + 1 < times:
                found[-1] = found[-1].clone()
                weight.grad.fill_(torch.nan)  # as an optimizer may
        return found

    once, *again = gradient(1.0, 1) + gradient(1.0, 3)
    assert all(torch.equal(once, x) for x in again)
    logits = hidden.detach().double() @ weight.detach().double().t()
    dz = (logits.softmax(-1) - torch.nn.functional.one_hot(labels, 300)) / rows
    true = dz.t() @ hidden.detach().double()
    for found, factor in ((once, 1.0), (gradient(1 / 3, 1)[0], 1 / 3)):
        assert found.dtype == dtype
        error = (found - factor * true).norm() / (factor * true).norm()
        assert error <= (1e-6 if dtype == torch.float32 else 4e-3)


@built
def test_the_gradient_is_not_copied() -> None:
    """What the loss made becomes `weight.grad`: no second pass over a large tensor."""
    pair = make_pair(8, 64, 300, dtype=BF16)
    weight = pair["student_weight"].requires_grad_()
    seen: list[int] = []
    weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = fused_linear_cross_entropy(pair["student_input"], weight, torch.arange(8))
    loss.backward()
    assert weight.grad is not None and seen == [weight.grad.data_ptr()]


@built
@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_a_workspace_is_used_again() -> None:
    """Freed, it serves the next call that fits; a tensor of the caller's never lies in it."""
    make = torch.ops.opsd_cpu.large_empty
    shape = [24, 2**20]
    first = make(shape, torch.float32, True)
    where = first.data_ptr()
    assert where % 2**21 == 0 and first.shape == (24, 2**20)
    other, gradient = make(shape, torch.float32, True), make(shape, torch.float32, False)
    assert len({where, other.data_ptr(), gradient.data_ptr()}) == 3
    del other, gradient, first
    kept = make([23, 2**20], torch.float32, True)
    assert make(shape, torch.float32, False).data_ptr() != kept.data_ptr()
    small = make([3, 5], BF16, True)
    assert small.shape == (3, 5) and small.dtype == BF16
