"""The pointwise clip: values, gradients and clipped mass for each divergence."""

import pytest
import torch

from opsd_kernels import reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import assert_close, make_pair
from tests.helpers.kernel_cases import STUDENT, check, run

pytestmark = pytest.mark.usefixtures("cpu_backend")

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


# Clips from one that catches nothing to one that catches nearly all; close pairs have tiny entries.
@pytest.mark.parametrize("kind", ["random", "close"])
@pytest.mark.parametrize("clip", [0.5, 0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("beta", BETAS)
def test_clip_values_and_gradients(beta: float, clip: float, kind: str) -> None:
    pair = make_pair(29, 16, 103, kind=kind, masked=3)
    options = {"beta": beta, "token_clip": clip, "temperature": 1.1}
    check(
        fused_linear_jsd,
        reference.linear_jsd,
        pair,
        STUDENT,
        dtype=torch.float64,
        reduction="none",
        **options,
    )
    check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, reduction="mean", **options)


@pytest.mark.parametrize("beta", BETAS)
def test_clipped_mass_restores_the_divergence(beta: float) -> None:
    pair = make_pair(29, 16, 103, seed=1, masked=3)
    _, plain = fused_linear_jsd(**pair, beta=beta, return_stats=True)
    loss, stats = fused_linear_jsd(**pair, beta=beta, token_clip=0.02, return_stats=True)
    assert "clipped_mass" not in plain
    assert (stats["clipped_mass"] >= 0).all() and (stats["clipped_mass"] > 0).any()
    assert_close(stats["divergence"] + stats["clipped_mass"], plain["divergence"])
    assert_close(loss, stats["divergence"].sum() / 26)


def test_forward_kl_clip_can_make_the_value_negative() -> None:
    pair = make_pair(29, 16, 103, seed=2)
    loss = fused_linear_jsd(**pair, beta=0.0, token_clip=1e-4, reduction="none")
    assert (loss < 0).any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_clip_nothing_reaches_changes_nothing(beta: float) -> None:
    pair = make_pair(29, 16, 103, seed=3)
    value, grads = run(fused_linear_jsd, pair, STUDENT, beta=beta)
    clipped, clipped_grads = run(fused_linear_jsd, pair, STUDENT, beta=beta, token_clip=1e4)
    assert_close(clipped[0], value[0])
    for name in STUDENT:
        assert_close(clipped_grads[name], grads[name], name=name)


@pytest.mark.parametrize(("beta", "banned"), [(0.0, "student"), (1.0, "teacher"), (0.5, "student")])
def test_infinite_entries_are_clipped_to_the_bound(beta: float, banned: str) -> None:
    pair = make_pair(29, 16, 103, seed=4)
    pair[f"{banned}_bias"][[0, 50, 102]] = float("-inf")
    options = {"beta": beta, "token_clip": 0.05, "reduction": "none"}
    check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, dtype=torch.float64, **options)
    check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **options)


def test_an_entry_equal_to_the_clip_is_unclipped() -> None:
    """Uniform student over 4, teacher on one: log 4 is the only positive entry, at the bound."""
    eye = torch.eye(4, dtype=torch.float64)
    student = torch.zeros(1, 4, dtype=torch.float64)
    teacher = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]], dtype=torch.float64)
    ls = student.log_softmax(-1)
    tensors = {
        "student_input": student,
        "student_weight": eye,
        "teacher_input": torch.zeros_like(student),
        "teacher_weight": eye,
        "teacher_bias": teacher[0],
    }
    bound = -ls[0, 0].item()
    outputs, grads = run(fused_linear_jsd, tensors, STUDENT[:1], [1.0], beta=0.0, token_clip=bound)
    expected = torch.tensor([[-0.75, 0.25, 0.25, 0.25]], dtype=torch.float64)
    assert_close(outputs[0], torch.tensor(bound, dtype=torch.float64))
    assert_close(grads["student_input"], expected)
