"""Vectors that are not contiguous, or start inside their storage, reach the kernels as they read.

Kernels index a vector by position alone: a stride they do not know of is another vector, silently.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.ops import divergence, logprob
from opsd_kernels.testing import make_pair, single
from tests.helpers.kernel_cases import SINGLE, STUDENT, check, move


def _filler(x: Tensor) -> Tensor:
    """What lies between and before the entries: NaN, or a label that is wrong everywhere."""
    return torch.full_like(x, torch.nan if x.is_floating_point() else 1)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, _filler(x)], 1).flatten()[::2]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([_filler(x)[:3], x, _filler(x)])[3 : 3 + len(x)]


LAYOUTS = pytest.mark.parametrize("layout", [strided, expanded, sliced])


def laid_out(fn: Callable, name: str, layout: Callable) -> Callable:
    """fn with one argument in that layout; gradients are those of the tensor before."""
    return lambda **p: fn(**{**p, name: layout(p[name])})


def differentiated(names: tuple[str, ...], name: str, layout: Callable) -> list[str]:
    """The same number on every logit changes no softmax: of that, the gradient is only rounding."""
    return [n for n in names if n != name or layout is not expanded]


@LAYOUTS
@pytest.mark.parametrize("name", ["student_bias", "teacher_bias", "shift_labels", "token_weight"])
def test_of_the_divergence(name: str, layout: Callable, place: tuple[str, str]) -> None:
    device, schedule = place
    pair = make_pair(9, 16, 67, seed=3, dtype=torch.float32)
    pair["token_weight"] = torch.linspace(0.5, 2, 9)

    def ours(**p: Tensor) -> tuple:
        loss, stats = fused_linear_jsd(**p, reduction="none", return_stats=True, schedule=schedule)
        return loss, *stats.values()

    def truth(**p: Tensor) -> tuple:
        loss, stats = reference.linear_jsd(**p, reduction="none", return_stats=True)
        return loss, *stats.values()

    fns = [laid_out(fn, name, layout) for fn in (ours, truth)]
    check(*fns, pair, differentiated(STUDENT, name, layout), device=device, max_factor=4.0)


@LAYOUTS
@pytest.mark.parametrize("name", ["bias", "target", "token_weight"])
def test_of_one_distribution(name: str, layout: Callable, place: tuple[str, str]) -> None:
    device, schedule = place
    inputs = single(make_pair(9, 16, 67, seed=4, dtype=torch.float32))
    inputs["token_weight"] = torch.linspace(0.5, 2, 9)

    def ours(**p: Tensor) -> Tensor:
        return fused_linear_cross_entropy(**p, label_smoothing=0.1, schedule=schedule)

    def truth(**p: Tensor) -> Tensor:
        return reference.linear_cross_entropy(**p, label_smoothing=0.1)

    fns = [laid_out(fn, name, layout) for fn in (ours, truth)]
    check(*fns, inputs, differentiated(SINGLE, name, layout), device=device, max_factor=4.0)


@LAYOUTS
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_of_upstream_gradients(trained: bool, layout: Callable, place: tuple[str, str]) -> None:
    device, schedule = place
    inputs = move(single(make_pair(9, 16, 67, seed=5, dtype=torch.float32)), device)
    leaves = [inputs[name].requires_grad_() for name in (SINGLE if trained else SINGLE[:1])]
    upstream = [torch.linspace(-1, 1, 9, device=device), torch.linspace(2, 0.5, 9, device=device)]
    results = fused_linear_logprob(**inputs, return_entropy=True, schedule=schedule)
    found = torch.autograd.grad(results, leaves, [layout(u) for u in upstream])
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = reference.linear_logprob(**exact, return_entropy=True)
    expected = torch.autograd.grad(truth, leaves, [layout(u).double() for u in upstream])
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-4, atol=2e-5 * right.abs().max().item())


def divergence_call(p: dict[str, Tensor], vectors: dict[str, Tensor], schedule: str) -> tuple:
    heads = ("student_input", "student_weight", "student_bias")
    heads += ("teacher_input", "teacher_weight", "teacher_bias")
    p = {**p, **vectors}
    return divergence.divergence_sum(
        *(p[name] for name in heads), p["labels"], p["keep"], 0.5, None, None, None, 1.0, 1.0,
        True, schedule, None, None, "auto", True, True, True, p["row_scale"],
    )  # fmt: skip


def logprob_call(p: dict[str, Tensor], vectors: dict[str, Tensor], schedule: str) -> tuple:
    p = {**p, **vectors}
    return logprob.logprob_sum(
        p["student_input"], p["student_weight"], p["student_bias"], p["labels"], p["keep"],
        p["class_weight"], p["label_weight"], None, None, 1.0, 0.1, True, True, schedule, None,
        None, True, True, True, p["row_scale"], p["entropy_scale"], None,
    )  # fmt: skip


def operands(device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(matrices, vectors) of a call of the operators."""
    p = move(make_pair(9, 16, 67, seed=6, dtype=torch.float32), device)
    vectors = {name: p.pop(name) for name in ("student_bias", "teacher_bias")}
    vectors["labels"] = p.pop("shift_labels")
    vectors["class_weight"] = torch.linspace(0.5, 1, 67, device=device)
    vectors["label_weight"] = torch.linspace(1, 0.5, 9, device=device)
    vectors["row_scale"] = torch.linspace(-1, 2, 9, device=device)
    vectors["entropy_scale"] = torch.linspace(1, -1, 9, device=device)
    return p, vectors


def equal_bits(fn: Callable, call: Callable, p: dict, laid: dict, schedule: str) -> None:
    """fn of the vectors as they are against the operator of contiguous ones."""
    same = {name: None if x is None else x.contiguous() for name, x in laid.items()}
    for i, (a, b) in enumerate(zip(fn(p, laid, schedule), call(p, same, schedule), strict=True)):
        assert torch.equal(a, b), f"output {i}"


@LAYOUTS
@pytest.mark.parametrize("masked", [False, True], ids=["every row", "some rows"])
@pytest.mark.parametrize("call", [divergence_call, logprob_call])
def test_of_the_operators_themselves(
    call: Callable, masked: bool, layout: Callable, place: tuple[str, str]
) -> None:
    """Every vector at once, without the checks in front."""
    device, schedule = place
    p, vectors = operands(device)
    laid = {name: layout(x) for name, x in vectors.items()}
    laid["keep"] = layout(torch.arange(9, device=device) % 4 != 3) if masked else None
    equal_bits(call, call, p, laid, schedule)


@pytest.mark.parametrize("call", [divergence_call, logprob_call])
def test_of_the_operators_in_a_compiled_function(call: Callable, place: tuple[str, str]) -> None:
    device, schedule = place
    p, vectors = operands(device)
    laid = {**{name: strided(x) for name, x in vectors.items()}, "keep": None}
    torch._dynamo.reset()
    equal_bits(torch.compile(call, backend="aot_eager", fullgraph=True), call, p, laid, schedule)
