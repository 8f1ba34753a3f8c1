"""The yardstick: honest rounding passes, a zeroed, doubled or flipped gradient does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.testing import assert_close, cast, make_pair, measure
from tests.helpers.kernel_cases import STUDENT, run


def halve_last_row(x: Tensor) -> Tensor:
    x = x.clone()
    x[-1] *= 0.5
    return x


MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeroed": torch.zeros_like,
    "doubled": lambda x: 2 * x,
    "flipped": torch.neg,
    "ten percent off": lambda x: 1.1 * x,
    "one row halved": halve_last_row,
    "NaN": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 0, torch.nan, x),
}


# Close pairs have the smallest gradients, 16 bits the widest tolerance.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "close"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_tolerances_reject_wrong_results(beta: float, kind: str, dtype: torch.dtype) -> None:
    inputs = cast(make_pair(40, 32, 300, kind=kind), dtype)
    options = {"beta": beta, "reduction": "none"}
    true, true_grads = run(reference.linear_jsd, cast(inputs, torch.float64), STUDENT, **options)
    plain, plain_grads = run(reference.linear_jsd, inputs, STUDENT, **options)
    pairs = {name: (true_grads[name], plain_grads[name]) for name in STUDENT}
    # A bf16 value of a close pair is mostly rounding: test_low_precision has a bound of its own.
    if kind == "random":
        pairs["value"] = (true[0], plain[0])
    for name, (truth, rounded) in pairs.items():
        assert_close(rounded, truth, rounded, factor=1.0, name=name)
        for label, mutate in MUTATIONS.items():
            if label.startswith(("ten", "one")) and dtype == torch.bfloat16:
                continue
            with pytest.raises(AssertionError):
                assert_close(mutate(truth), truth, rounded, name=f"{name} {label}")


def test_message_names_the_worst_coordinate() -> None:
    truth = torch.arange(6.0).reshape(2, 3)
    wrong = truth.clone()
    wrong[1, 0] += 5
    with pytest.raises(
        AssertionError, match=r"dh: maximum error 5.* worst at \(1, 0\): got 8, truth 3"
    ):
        assert_close(wrong, truth, truth, name="dh")


def test_infinities_must_agree() -> None:
    truth = torch.tensor([1.0, torch.inf])
    assert_close(truth.clone(), truth)
    for other in (torch.tensor([1.0, 2.0]), torch.tensor([torch.inf, torch.inf]), -truth):
        with pytest.raises(AssertionError):
            assert_close(other, truth, atol=0.1)


def test_rms_catches_what_the_maximum_hides() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    plain = truth.clone()
    plain[0] = 1.0
    with pytest.raises(AssertionError, match="RMS"):
        assert_close(truth + 0.9, truth, plain)


def test_scalars_and_empty_tensors() -> None:
    assert measure(torch.tensor(2.0), torch.tensor(3.0)).maximum == 1.0
    assert_close(torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(1), torch.tensor(0.0))


def test_close_pair_is_close() -> None:
    pair = make_pair(30, 16, 50, kind="close")
    gap = (pair["teacher_input"] - pair["student_input"]).square().mean().sqrt()
    assert 0.04 < gap < 0.06
    assert torch.equal(pair["student_weight"], pair["teacher_weight"])
