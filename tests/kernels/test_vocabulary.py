"""Heads: shared between student and teacher, padded differently, of another width or dtype."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_advantage import fused_linear_advantage
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import assert_close, cast, make_pair, single
from tests.helpers.kernel_cases import SINGLE, STUDENT, check, run

pytestmark = pytest.mark.usefixtures("cpu_backend")

BETAS = [0.0, 0.5, 1.0]


# A shared head saves products and memory for each set of gradients in another way.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrt", [(), STUDENT[:1], STUDENT], ids=["forward", "frozen", "trained"])
@pytest.mark.parametrize("beta", BETAS)
def test_shared_head_equals_separate_heads(
    beta: float, wrt: tuple[str, ...], reduction: str, dtype: torch.dtype
) -> None:
    pair = make_pair(29, 12, 70, kind="close", masked=3, dtype=dtype)

    def shared(**p: Tensor) -> Tensor:
        p["teacher_weight"] = p["student_weight"]
        return fused_linear_jsd(**p)

    options = {"beta": beta, "reduction": reduction}
    check(shared, reference.linear_jsd, pair, wrt, dtype=dtype, **options)


def test_shared_head_in_bfloat16() -> None:
    pair = cast(make_pair(64, 48, 500, kind="close"), torch.bfloat16)
    separate = run(fused_linear_jsd, pair, STUDENT[:1])
    pair["teacher_weight"] = pair["student_weight"]
    shared = run(fused_linear_jsd, pair, STUDENT[:1])
    truth = run(reference.linear_jsd, cast(pair, torch.float64), STUDENT[:1])
    for i in range(2):
        ours, theirs, exact = (
            x[0][0] if i == 0 else x[1]["student_input"] for x in (shared, separate, truth)
        )
        assert_close(ours, exact, theirs)


# Columns beyond the shared vocabulary must get zero gradient, whichever gradient is asked for.
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrt", [STUDENT[:1], STUDENT[1:2], STUDENT], ids="+".join)
@pytest.mark.parametrize("beta", BETAS)
def test_heads_padded_differently(beta: float, wrt: tuple[str, ...], reduction: str) -> None:
    real = make_pair(23, 12, 61, masked=3)
    padded = dict(real)
    for who, rows in (("student", 3), ("teacher", 11)):
        # Padding rows are trained by nobody and may hold anything.
        padded[f"{who}_weight"] = F.pad(real[f"{who}_weight"], (0, 0, 0, rows), value=torch.nan)
        padded[f"{who}_bias"] = F.pad(real[f"{who}_bias"], (0, rows), value=50.0)
    options = {"beta": beta, "reduction": reduction}
    expected, expected_grads = run(fused_linear_jsd, real, wrt, **options)
    found, grads = run(fused_linear_jsd, padded, wrt, vocab_size=61, **options)
    assert_close(found[0], expected[0])
    for name in wrt:
        grad = grads[name]
        assert grad.shape == padded[name].shape
        if name != "student_input":
            assert (grad[61:] == 0).all()
            grad = grad[:61]
        assert_close(grad, expected_grads[name], name=name)


@pytest.mark.parametrize(
    ("fn", "truth"),
    [
        (fused_linear_logprob, reference.linear_logprob),
        (fused_linear_cross_entropy, reference.linear_cross_entropy),
    ],
)
def test_vocab_size_of_one_distribution(fn: Callable, truth: Callable) -> None:
    case = single(make_pair(23, 12, 64, masked=3))
    case["target"] = case["target"].clamp(max=59)
    check(fn, truth, case, SINGLE, vocab_size=60)


def test_vocab_size_of_the_advantage() -> None:
    pair = make_pair(23, 12, 64, teacher_hidden=7, masked=3)
    pair["target"] = pair.pop("shift_labels").clamp(max=59)
    pair["teacher_weight"] = F.pad(pair["teacher_weight"], (0, 0, 0, 5))
    pair["teacher_bias"] = F.pad(pair["teacher_bias"], (0, 5))
    check(fused_linear_advantage, reference.linear_advantage, pair, STUDENT, vocab_size=60)


@pytest.mark.parametrize("width", [5, 12, 40])
def test_teacher_of_another_width(width: int) -> None:
    pair = make_pair(23, 12, 70, teacher_hidden=width)
    check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, reduction="none")


def test_teacher_of_another_dtype() -> None:
    pair = make_pair(23, 12, 70, dtype=torch.float32)
    for part in ("input", "weight", "bias"):
        pair[f"teacher_{part}"] = pair[f"teacher_{part}"].bfloat16()
    upcast = {k: v.float() if v.is_floating_point() else v for k, v in pair.items()}
    found, grads = run(fused_linear_jsd, pair, STUDENT, reduction="none")
    truth, true_grads = run(
        reference.linear_jsd, cast(pair, torch.float64), STUDENT, reduction="none"
    )
    # The teacher's logits may be rounded to its dtype once, as its own forward pass would do.
    rounded = upcast["teacher_input"] @ upcast["teacher_weight"].T
    rounded = (rounded.bfloat16() + pair["teacher_bias"]).float()
    eye = torch.eye(70)
    plain_inputs = {**upcast, "teacher_input": rounded, "teacher_weight": eye}
    del plain_inputs["teacher_bias"]
    plain, plain_grads = run(reference.linear_jsd, plain_inputs, STUDENT, reduction="none")
    assert_close(found[0], truth[0], plain[0])
    for name in STUDENT:
        assert grads[name].dtype == torch.float32
        assert_close(grads[name], true_grads[name], plain_grads[name], name=name)
