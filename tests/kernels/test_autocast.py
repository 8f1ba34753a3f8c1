"""Autocast is respected: fp32 masters multiply in its dtype, gradients come back in fp32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import assert_close, cast, make_pair, single
from tests.helpers.kernel_cases import run

DTYPE = torch.bfloat16


def without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith("bias")}


PAIR = without_bias(make_pair(48, 32, 300, masked=4, dtype=torch.float32))
HEAD = ("student_input", "student_weight")
CASES = [
    (fused_linear_jsd, reference.linear_jsd, PAIR, HEAD),
    (fused_linear_jsd, reference.linear_jsd, PAIR, HEAD[:1]),
    (
        fused_linear_logprob,
        reference.linear_logprob,
        without_bias(single({**PAIR, "student_bias": None})),
        ("input", "weight"),
    ),
    (
        fused_linear_cross_entropy,
        reference.linear_cross_entropy,
        without_bias(single({**PAIR, "student_bias": None})),
        ("input", "weight"),
    ),
]


def under_autocast(fn: Callable) -> Callable:
    def call(**arguments: object) -> Tensor:
        with torch.autocast("cpu", DTYPE):
            return fn(**arguments)

    return call


@pytest.mark.parametrize(("fn", "truth", "tensors", "wrt"), CASES)
def test_equals_casting_by_hand(
    fn: Callable, truth: Callable, tensors: dict, wrt: tuple[str, ...]
) -> None:
    inputs = cast(tensors, DTYPE)
    by_hand, _ = run(fn, inputs, wrt)
    ours, grads = run(under_autocast(fn), tensors, wrt)
    assert ours[0].dtype == torch.float32
    assert torch.equal(ours[0], by_hand[0])
    _, true_grads = run(truth, cast(inputs, torch.float64), wrt)
    _, plain_grads = run(truth, inputs, wrt)
    for name in wrt:
        assert grads[name].dtype == torch.float32
        assert_close(
            grads[name], true_grads[name], plain_grads[name], factor=1.2, max_factor=2.0, name=name
        )


def test_mixed_input_and_head() -> None:
    """bf16 activations with an fp32 head, which is an error without autocast."""
    mixed = {
        **PAIR,
        "student_input": PAIR["student_input"].bfloat16(),
        "teacher_weight": PAIR["teacher_weight"].bfloat16(),
    }
    ours, grads = run(under_autocast(fused_linear_jsd), mixed, HEAD)
    by_hand, _ = run(fused_linear_jsd, cast(PAIR, DTYPE), HEAD)
    assert torch.equal(ours[0], by_hand[0])
    assert grads["student_input"].dtype == DTYPE and grads["student_weight"].dtype == torch.float32


def test_a_disabled_region_stays_in_fp32() -> None:
    with torch.autocast("cpu", DTYPE), torch.autocast("cpu", enabled=False):
        inside = fused_linear_jsd(**PAIR)
    assert torch.equal(inside, fused_linear_jsd(**PAIR))


def test_bias_under_autocast() -> None:
    pair = make_pair(48, 32, 300, seed=1, dtype=torch.float32)
    truth = reference.linear_jsd(**cast(cast(pair, DTYPE), torch.float64), reduction="none")
    plain = reference.linear_jsd(**cast(pair, DTYPE), reduction="none")
    ours = under_autocast(fused_linear_jsd)(**pair, reduction="none")
    assert_close(ours, truth, plain)
