"""Properties at random shapes, independent of any reference."""

import pytest
import torch
from torch import Tensor

from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import cast, make_pair, single
from tests.helpers.kernel_cases import SINGLE, STUDENT, run, workspace_for

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("cpu_backend")

quick = settings(max_examples=25, deadline=None, derandomize=True)
tokens_, hidden_, vocab_ = st.integers(1, 40), st.integers(1, 20), st.integers(2, 150)
seeds = st.integers(0, 10_000)
betas = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.01, 0.99))
temperatures = st.floats(0.5, 2.0)
dtypes = st.sampled_from([torch.float32, torch.float64])
subsets = st.sets(st.sampled_from(STUDENT), min_size=1, max_size=2).map(lambda s: tuple(sorted(s)))


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@quick
@given(tokens_, hidden_, vocab_, seeds, betas, temperatures, dtypes)
def test_divergence_is_not_negative(n, d, v, seed, beta, temperature, dtype) -> None:
    pair = make_pair(n, d, v, seed=seed, dtype=dtype)
    loss = fused_linear_jsd(**pair, beta=beta, temperature=temperature, reduction="none")
    rounding = 200 * torch.finfo(dtype).eps
    assert (loss >= -rounding).all()


@quick
@given(tokens_, hidden_, vocab_, seeds, betas, dtypes)
def test_equal_inputs_diverge_by_nothing(n, d, v, seed, beta, dtype) -> None:
    pair = make_pair(n, d, v, seed=seed, dtype=dtype)
    for part in ("input", "weight", "bias"):
        pair[f"teacher_{part}"] = pair[f"student_{part}"].clone()
    values, grads = run(fused_linear_jsd, pair, STUDENT[:1], [1.0], beta=beta, reduction="sum")
    rounding = 200 * n * torch.finfo(dtype).eps
    assert abs(values[0].item()) <= rounding
    assert grads["student_input"].abs().max() <= rounding


@quick
@given(tokens_, hidden_, vocab_, seeds, st.floats(0.01, 0.99))
def test_jsd_is_symmetric_when_beta_is_mirrored(n, d, v, seed, beta) -> None:
    pair = make_pair(n, d, v, seed=seed)
    swapped = {
        name.replace("student", "*").replace("teacher", "student").replace("*", "teacher"): value
        for name, value in pair.items()
    }
    there = fused_linear_jsd(**pair, beta=beta, reduction="none")
    back = fused_linear_jsd(**swapped, beta=1 - beta, reduction="none")
    near(there, back)
    near(fused_linear_jsd(**pair, reduction="none"), fused_linear_jsd(**swapped, reduction="none"))


@quick
@given(tokens_, hidden_, vocab_, seeds, betas, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(n, d, v, seed, beta, a, b) -> None:
    pair = make_pair(n, d, v, seed=seed)
    moved = {
        **pair,
        "student_bias": pair["student_bias"] + a,
        "teacher_bias": pair["teacher_bias"] + b,
    }
    before = run(fused_linear_jsd, pair, STUDENT, beta=beta, reduction="none")
    after = run(fused_linear_jsd, moved, STUDENT, beta=beta, reduction="none")
    near(before[0][0], after[0][0])
    for name in STUDENT:
        near(before[1][name], after[1][name])


@quick
@given(st.integers(2, 40), hidden_, vocab_, seeds, betas, dtypes, st.sampled_from(["mean", "none"]))
def test_masked_tokens_get_exactly_nothing(n, d, v, seed, beta, dtype, reduction) -> None:
    pair = make_pair(n, d, v, seed=seed, dtype=dtype, masked=n // 2)
    weight = torch.ones(n)
    weight[seed % n] = 0.0
    masked = (pair["shift_labels"] == -100) | (weight == 0)
    options = {"beta": beta, "reduction": reduction, "token_weight": weight}
    values, grads = run(fused_linear_jsd, pair, STUDENT, **options)
    assert (grads["student_input"][masked] == 0).all()
    if reduction == "none":
        assert (values[0][masked] == 0).all()
    kept = {k: v[~masked] if k.endswith(("input", "labels")) else v for k, v in pair.items()}
    alone = fused_linear_jsd(**kept, beta=beta, reduction="sum")
    whole = fused_linear_jsd(**pair, beta=beta, token_weight=weight, reduction="sum")
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)


@quick
@given(
    tokens_, hidden_, vocab_, seeds, betas, st.integers(1, 60), st.sampled_from(["mean", "none"])
)
def test_the_workspace_does_not_change_the_result(n, d, v, seed, beta, rows, reduction) -> None:
    pair = make_pair(n, d, v, seed=seed, masked=n // 3)
    options = {"beta": beta, "reduction": reduction}
    whole = run(fused_linear_jsd, pair, STUDENT, **options)
    budget = workspace_for(rows, n, d, v, dtype=torch.float64, grad_weight=True)
    blocks = run(fused_linear_jsd, pair, STUDENT, workspace_bytes=budget, **options)
    near(whole[0][0], blocks[0][0])
    for name in STUDENT:
        near(whole[1][name], blocks[1][name])


@quick
@given(tokens_, hidden_, vocab_, seeds, st.integers(1, 60))
def test_the_workspace_does_not_change_log_probabilities(n, d, v, seed, rows) -> None:
    case = single(make_pair(n, d, v, seed=seed, masked=n // 3))
    options = {"return_entropy": True, "temperature": 1.2}
    whole = run(fused_linear_logprob, case, SINGLE, **options)
    budget = workspace_for(
        rows, n, d, v, loss="logprob", dtype=torch.float64, grad_weight=True, entropy_grad=True
    )
    blocks = run(fused_linear_logprob, case, SINGLE, workspace_bytes=budget, **options)
    for a, b in zip(whole[0], blocks[0], strict=True):
        near(a, b)
    for name in SINGLE:
        near(whole[1][name], blocks[1][name])


@quick
@given(tokens_, hidden_, vocab_, seeds, betas, subsets, st.sampled_from(["mean", "none"]))
def test_partial_gradients_equal_the_full_run(n, d, v, seed, beta, wrt, reduction) -> None:
    pair = make_pair(n, d, v, seed=seed, masked=n // 3)
    budget = workspace_for(7, n, d, v, dtype=torch.float64)
    options = {"beta": beta, "reduction": reduction, "workspace_bytes": budget}
    full = run(fused_linear_jsd, pair, STUDENT, **options)
    part = run(fused_linear_jsd, pair, wrt, **options)
    near(full[0][0], part[0][0])
    for name in wrt:
        near(full[1][name], part[1][name])


@quick
@given(st.integers(1, 200), hidden_, vocab_, seeds, betas, st.sampled_from(["mean", "none"]))
def test_two_runs_give_the_same_bits(n, d, v, seed, beta, reduction) -> None:
    pair = make_pair(n, d, v, seed=seed, masked=n // 3, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = cast(pair, dtype)
        first = run(fused_linear_jsd, inputs, STUDENT, beta=beta, reduction=reduction)
        second = run(fused_linear_jsd, inputs, STUDENT, beta=beta, reduction=reduction)
        assert torch.equal(first[0][0], second[0][0])
        for name in STUDENT:
            assert torch.equal(first[1][name], second[1][name]), name
