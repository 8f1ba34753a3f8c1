"""GEMMs of the `blocked` schedule are as many as the plan says, counted by the profiler."""

from collections.abc import Callable

import pytest
import torch

from opsd_kernels import plan
from opsd_kernels.fused_advantage import fused_linear_advantage
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import single
from tests.helpers.gemm_counter import HEAD, D, N, V, case, gemms
from tests.helpers.kernel_cases import run, workspace_for

pytestmark = pytest.mark.usefixtures("torch_backend")


def test_the_counter_counts() -> None:
    h, w = torch.randn(N, D), torch.randn(V, D)
    assert gemms(lambda: h @ w.T) == 1
    assert gemms(lambda: torch.nn.functional.linear(h.view(4, -1, D), w, torch.zeros(V))) == 1
    assert gemms(lambda: torch.empty(N, V).addmm_(h, w.T, beta=0)) == 1
    assert gemms(lambda: torch.mm(h, w.T, out=torch.empty(N, V))) == 1
    leaf = h.clone().requires_grad_()
    assert gemms(lambda: (leaf @ w.T).sum().backward()) == 2


# One row for each promise of the plan; 40 rows make several blocks, the last one short.
@pytest.mark.parametrize("rows", [None, 40])
@pytest.mark.parametrize(
    ("wrt", "reduction", "expected"),
    [
        ((), "mean", 2),
        ((), "none", 2),
        (HEAD[:1], "mean", 3),
        (HEAD[:1], "sum", 3),
        (HEAD[:1], "none", 3),
        (HEAD, "mean", 4),
        (HEAD, "sum", 4),
        (HEAD, "none", 6),
    ],
)
@pytest.mark.parametrize("fn", [fused_linear_jsd, fused_linear_forward_kl, fused_linear_reverse_kl])
def test_divergences(
    fn: Callable, wrt: tuple[str, ...], reduction: str, expected: int, rows: int | None
) -> None:
    workspace_bytes = None if rows is None else workspace_for(rows, N, D, V)
    options = {"reduction": reduction, "workspace_bytes": workspace_bytes, "return_stats": True}
    upstream = [torch.ones(N)] if reduction == "none" and wrt else None  # tokens of 0 are left out
    assert gemms(lambda: run(fn, case(), wrt, upstream, **options)) == pytest.approx(expected)
    promised = plan(
        N,
        D,
        V,
        grad_input="student_input" in wrt,
        grad_weight="student_weight" in wrt,
        reduced=reduction != "none",
        workspace_bytes=workspace_bytes,
    )
    assert promised.gemms == expected
    assert promised.num_blocks == (1 if rows is None else 3)


@pytest.mark.parametrize(
    ("fn", "wrt", "options", "expected"),
    [
        (fused_linear_logprob, (), {"return_entropy": True}, 1),
        (fused_linear_cross_entropy, (), {}, 1),
        (fused_linear_logprob, ("input",), {}, 2),
        (fused_linear_cross_entropy, ("input",), {}, 2),
        (fused_linear_cross_entropy, ("input",), {"reduction": "none"}, 2),
        (fused_linear_cross_entropy, ("input", "weight"), {}, 3),
        (fused_linear_cross_entropy, ("input", "weight"), {"reduction": "sum"}, 3),
        (fused_linear_logprob, ("input", "weight"), {}, 4),
        (fused_linear_logprob, ("input",), {"return_entropy": True}, 3),
    ],
)
def test_log_probability_family(
    fn: Callable, wrt: tuple[str, ...], options: dict[str, object], expected: int
) -> None:
    inputs = single(case(seed=1))
    reduced = fn is fused_linear_cross_entropy and options.get("reduction") != "none"
    outputs = 1 + ("return_entropy" in options)
    upstream = [torch.ones(N)] * outputs if wrt and not reduced else None
    assert gemms(lambda: run(fn, inputs, wrt, upstream, **options)) == pytest.approx(expected)
    promised = plan(
        N,
        D,
        V,
        loss="logprob",
        grad_input="input" in wrt,
        grad_weight="weight" in wrt,
        reduced=reduced,
        entropy_grad="return_entropy" in options and bool(wrt),
    )
    assert promised.gemms == expected


@pytest.mark.parametrize(("wrt", "expected"), [((), 1), (("input",), 2), (("input", "weight"), 4)])
def test_several_targets_take_the_products_of_one(wrt: tuple[str, ...], expected: int) -> None:
    inputs = single(case(seed=1))
    offsets = torch.arange(3) * (V // 3)
    inputs["target"] = (inputs["target"][:, None] + offsets).remainder(V)
    upstream = [torch.ones(N, 3), torch.ones(N)] if wrt else None
    how = {"return_lse": True}
    found = gemms(lambda: run(fused_linear_logprob, inputs, wrt, upstream, **how))
    # The rows of the targets themselves are products of 2 N D K, in backward once more.
    assert expected <= found <= expected + 2 * 3 / V + 1e-9


def test_no_grad_mode_runs_no_gradient_gemm() -> None:
    leaves = {
        k: v.requires_grad_() if v.is_floating_point() else v for k, v in case(seed=2).items()
    }
    leaves = {k: v.detach() if k.startswith("teacher") else v for k, v in leaves.items()}
    with torch.no_grad():
        assert gemms(lambda: fused_linear_jsd(**leaves)) == pytest.approx(2)
        assert gemms(lambda: fused_linear_cross_entropy(**single(leaves))) == pytest.approx(1)


def test_advantage_needs_one_gemm_per_model_and_one_for_the_gradient() -> None:
    pair = case(seed=3)
    pair["target"] = pair.pop("shift_labels")
    assert gemms(lambda: run(fused_linear_advantage, pair)) == pytest.approx(2)
    assert gemms(lambda: run(fused_linear_advantage, pair, HEAD[:1])) == pytest.approx(3)


@pytest.mark.parametrize("wrt", [HEAD[:1], HEAD])
def test_masked_rows_are_never_multiplied(wrt: tuple[str, ...]) -> None:
    whole = gemms(lambda: run(fused_linear_jsd, case(seed=4), wrt))
    masked = gemms(lambda: run(fused_linear_jsd, case(masked=3 * N // 4, seed=4), wrt))
    weight = torch.arange(N) % 4 == 0
    weighted = gemms(lambda: run(fused_linear_jsd, case(seed=4), wrt, token_weight=weight.float()))
    assert masked == pytest.approx(whole / 4)
    assert weighted == pytest.approx(whole / 4)


def test_shared_head_costs_no_more() -> None:
    pair = case(seed=5)
    pair["teacher_weight"] = pair["student_weight"]
    assert gemms(lambda: run(fused_linear_jsd, pair, HEAD[:1])) == pytest.approx(3)
