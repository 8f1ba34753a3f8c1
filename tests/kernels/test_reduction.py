"""Sums over tokens: reductions, weights, the global divisor under accumulation, statistics."""

import functools

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from opsd_kernels import reference
from opsd_kernels.fused_advantage import policy_gradient_loss
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.reduction import row_scale
from opsd_kernels.testing import assert_close, make_pair, single
from tests.helpers.kernel_cases import LOSSES, REDUCED, STUDENT, check, prepare, run, same_bits

pytestmark = pytest.mark.usefixtures("cpu_backend")

ROWS = ("student_input", "teacher_input", "shift_labels")


def token_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.linspace(-1, 2, 28).round(decimals=1).to(dtype)
    weight[[5, 6]] = 0.0
    return weight


# Weights enter the mean's divisor, the sum and each value differently; beta picks the formula.
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_token_weight(beta: float, reduction: str) -> None:
    pair = make_pair(28, 12, 70, masked=4)
    options = {"beta": beta, "reduction": reduction, "token_weight": token_weight()}
    for dtype in (torch.float32, torch.float64):
        check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, dtype=dtype, **options)


def test_weights_do_not_change_the_divisor() -> None:
    pair = make_pair(28, 12, 70, masked=4)
    each = fused_linear_jsd(**pair, token_weight=token_weight(), reduction="none")
    assert_close(fused_linear_jsd(**pair, token_weight=token_weight()), each.sum() / 24)
    no_labels = {k: v for k, v in pair.items() if k != "shift_labels"}
    each = fused_linear_jsd(**no_labels, token_weight=token_weight(), reduction="none")
    assert_close(fused_linear_jsd(**no_labels, token_weight=token_weight()), each.sum() / 28)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype(dtype: torch.dtype) -> None:
    pair = make_pair(28, 12, 70, dtype=torch.float32)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0]).repeat(7)
    expected = fused_linear_jsd(**pair, token_weight=weight)
    found = fused_linear_jsd(**pair, token_weight=weight.to(dtype))
    assert found.dtype == torch.float32
    assert_close(found, expected)


DIVISORS = [100, 100.0, torch.tensor(100), torch.tensor(100.0)]
# float64 of one dimension would promote the values, and any shape would shape the loss.
DIVISORS += [torch.tensor([100]), torch.tensor([[100]]), torch.tensor([[[100.0]]]).double()]


@pytest.mark.parametrize("divisor", DIVISORS, ids=repr)
def test_num_tokens_divides(divisor: float | Tensor) -> None:
    pair = make_pair(28, 12, 70, masked=4)
    total, total_grads = run(fused_linear_jsd, pair, STUDENT, [1.0], reduction="sum")
    mean, grads = run(fused_linear_jsd, pair, STUDENT, [1.0], num_tokens=divisor)
    assert_close(mean[0], total[0] / 100)
    for name in STUDENT:
        assert_close(grads[name], total_grads[name] / 100, name=name)
    case = single(pair)
    total = fused_linear_cross_entropy(**case, reduction="sum")
    assert_close(fused_linear_cross_entropy(**case, num_tokens=divisor), total / 100)
    values = torch.linspace(-1, 2, 28), torch.linspace(-3, 0, 28)
    total = policy_gradient_loss(*values, reduction="sum")
    assert_close(policy_gradient_loss(*values, num_tokens=divisor), total / 100)


# A trained head and a frozen one divide by num_tokens in different places.
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", REDUCED)
def test_num_tokens_of_any_shape_in_every_loss(name: str, trained: bool) -> None:
    loss, inputs, wrt, options = prepare(name, make_pair(9, 6, 31, masked=2), trained, "mean")
    fn = functools.partial(loss.fn, **options)
    expected = run(fn, inputs, wrt, [1.0], num_tokens=5)
    for divisor in (torch.tensor([5]), torch.tensor([[5.0]])):
        found = run(fn, inputs, wrt, [1.0], num_tokens=divisor)
        assert found[0][0].shape == ()
        same_bits(found, expected)
    with pytest.raises(ValueError, match="num_tokens"):
        run(fn, inputs, wrt, [1.0], num_tokens=torch.tensor([5, 5]))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("sizes", [(0, 4, 7), (3, 4, 1), (0, 4, 1)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_no_token_or_one_entry(name: str, sizes: tuple[int, int, int], trained: bool) -> None:
    """The sums over nothing, and the only distribution over one entry: 0, with gradients of 0."""
    loss, inputs, wrt, options = prepare(name, make_pair(*sizes), trained, None)
    values, grads = run(loss.fn, inputs, wrt, **options)
    for value in (*values, *grads.values()):
        torch.testing.assert_close(value, torch.zeros_like(value))


@pytest.mark.parametrize("divisor", DIVISORS[2:], ids=repr)
def test_num_tokens_of_the_cpu_divides_on_a_gpu(divisor: Tensor) -> None:
    """Fake tensors know which devices may meet, and need no GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = torch.empty(28, 12, device="cuda")
        scale = row_scale(values, None, None, None, "mean", divisor)
    assert scale.shape == (28,) and scale.dtype == torch.float32 and scale.device == values.device


@pytest.mark.parametrize("fn", [fused_linear_jsd, fused_linear_cross_entropy])
def test_two_halves_sum_to_the_whole(fn: object) -> None:
    """Gradient accumulation over micro-batches of unequal token counts."""
    pair = make_pair(28, 12, 70, masked=5)
    wrt = STUDENT
    rows = ROWS
    if fn is fused_linear_cross_entropy:
        pair, wrt, rows = single(pair), ("input", "weight", "bias"), ("input", "target")
    whole, whole_grads = run(fn, pair, wrt, [1.0])
    parts = []
    for cut in (slice(0, 9), slice(9, None)):
        half = {k: v[cut] if k in rows else v for k, v in pair.items()}
        parts.append(run(fn, half, wrt, [1.0], num_tokens=23))
    assert_close(parts[0][0][0] + parts[1][0][0], whole[0])
    for name in wrt:
        first, second = parts[0][1][name], parts[1][1][name]
        joined = torch.cat([first, second]) if name in rows else first + second
        assert_close(joined, whole_grads[name], name=name)


# Statistics come from another pass for each beta, and must not depend on the gradients asked for.
@pytest.mark.parametrize("wrt", [(), STUDENT[:1], STUDENT])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_stats(beta: float, clip: float | None, reduction: str, wrt: tuple[str, ...]) -> None:
    pair = make_pair(28, 12, 70, masked=4, seed=1)
    leaves = {k: v.clone().requires_grad_() if k in wrt else v for k, v in pair.items()}
    options = {"beta": beta, "token_clip": clip, "token_weight": token_weight(), "temperature": 1.2}
    loss, stats = fused_linear_jsd(**leaves, reduction=reduction, return_stats=True, **options)
    true, truth = reference.linear_jsd(**pair, reduction=reduction, return_stats=True, **options)
    assert_close(loss, true)
    assert set(stats) == set(truth)
    for name, value in stats.items():
        assert not value.requires_grad, name
        assert_close(value, truth[name], name=name, atol=1e-14)


def test_stats_in_float32_are_float32_and_need_labels_for_log_probabilities() -> None:
    pair = make_pair(28, 12, 70, dtype=torch.bfloat16)
    del pair["shift_labels"]
    loss, stats = fused_linear_jsd(**pair, return_stats=True)
    assert set(stats) == {"divergence", "student_entropy", "teacher_entropy"}
    assert all(x.dtype == torch.float32 for x in (loss, *stats.values()))


def test_another_ignore_index() -> None:
    pair = make_pair(28, 12, 70, masked=4)
    other = dict(
        pair, shift_labels=torch.where(pair["shift_labels"] == -100, 3, pair["shift_labels"])
    )
    options = {"ignore_index": 3, "reduction": "mean"}
    check(fused_linear_jsd, reference.linear_jsd, other, STUDENT, dtype=torch.float64, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    pair = make_pair(28, 12, 70)
    _, wide = fused_linear_jsd(**pair, return_stats=True)
    pair["shift_labels"] = pair["shift_labels"].to(dtype)
    _, narrow = fused_linear_jsd(**pair, return_stats=True)
    assert torch.equal(wide["student_logprob"], narrow["student_logprob"])
