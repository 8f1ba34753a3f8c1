"""What Triton's interpreter hides by itself: order of programs, fresh memory, inexact functions."""

import functools
from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import STUDENT, check, prepare, run, same_bits
from tests.helpers.triton_cases import KINDS, SCHEDULES, compare

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="shows through Triton's interpreter"
)
# Several programs of rows and of columns, whose last tiles are not whole.
SIZES = (19, 16, 201)


@pytest.fixture(autouse=True)
def interpreter(triton_device: str) -> ModuleType:
    from triton.runtime import interpreter

    return interpreter


def results(name: str, schedule: str) -> tuple:
    """Outputs and gradients of everything that is trained."""
    pair = make_pair(*SIZES, masked=3, dtype=torch.float32, seed=31)
    loss, inputs, wrt, options = prepare(name, pair, True, None)
    return run(loss.fn, inputs, wrt, **options, schedule=schedule)


clean = functools.cache(results)


# ------------------------------------------------------------------------------ order of programs


@pytest.fixture
def shuffled(interpreter, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Programs of a launch run in random order; how many ran before one that has a lower index."""
    builder, early = interpreter.interpreter_builder, [0]
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    g, waiting = torch.Generator().manual_seed(0), []

    def set_grid_dim(*dim: int) -> None:
        set_dim(*dim)
        places = list(product(*map(range, dim)))
        waiting[:] = [places[i] for i in torch.randperm(len(places), generator=g).tolist()]

    def set_grid_idx(*_: int) -> None:
        place = waiting.pop()
        early[0] += any(other < place for other in waiting)
        set_idx(*place)

    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    yield early


@SCHEDULES
@pytest.mark.parametrize("name", KINDS)
def test_programs_run_in_any_order(
    name: str, schedule: str, request: pytest.FixtureRequest
) -> None:
    in_order = clean(name, schedule)
    early = request.getfixturevalue("shuffled")
    same_bits(in_order, results(name, schedule))
    assert early[0] > 3, "nothing was shuffled"


# ---------------------------------------------------------------------------------- fresh memory


@pytest.fixture
def filled() -> Iterator[None]:
    """Every new tensor is full of NaN, or of the largest integer, until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@SCHEDULES
@pytest.mark.parametrize("name", KINDS)
def test_nothing_reads_memory_before_it_is_written(
    name: str, schedule: str, request: pytest.FixtureRequest
) -> None:
    before = clean(name, schedule)
    request.getfixturevalue("filled")
    same_bits(before, results(name, schedule))


# ----------------------------------------------------------------------------- inexact functions


@pytest.fixture
def inexact(interpreter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """exp and log off by up to 2 ulp, as on a GPU; calls so far.

    log2 is off by up to 2^-22 near 1, which is what PTX promises of lg2.approx. 0, infinities and
    NaN stay what they are.
    """
    random, calls = np.random.default_rng(0), [0]

    def noisy(exact: Callable, absolute: float) -> Callable:
        def function(x: np.ndarray) -> np.ndarray:
            y, calls[0] = exact(x), calls[0] + 1
            off = random.uniform(-1, 1, y.shape).astype(y.dtype)
            error = np.maximum(2 * np.spacing(np.abs(y)), y.dtype.type(absolute))
            keeps = ~np.isfinite(y) | (y == 0)
            return np.where(keeps, y, y + off * np.where(keeps, 0, error)).astype(y.dtype)

        return function

    for name, exact, absolute in (
        ("exp", np.exp, 0.0), ("exp2", np.exp2, 0.0), ("log", np.log, 0.0),
        ("log2", np.log2, 2.0**-22),
    ):  # fmt: skip
        builder = interpreter.InterpreterBuilder
        method = functools.partialmethod(builder.unary_op, op=noisy(exact, absolute))
        monkeypatch.setattr(builder, f"create_{name}", method)
    return calls


@SCHEDULES
@pytest.mark.parametrize("name", KINDS)
def test_inexact_functions_stay_within_the_house_rule(
    name: str, schedule: str, inexact: list[int]
) -> None:
    pair = make_pair(*SIZES, masked=3, seed=32)
    compare(name, pair, True, None, torch.float32, "cpu", schedule=schedule)
    assert inexact[0] > 10


@SCHEDULES
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_inexact_functions_on_close_pairs(beta: float, schedule: str, inexact: list[int]) -> None:
    """2 ulp are four times what a function rounded to nearest is off by."""
    pair = make_pair(*SIZES, kind="close", masked=3, seed=33)
    rules = {"only_ours": {"schedule": schedule}, "value_factor": 4.0, "max_factor": 4.0}
    options = {"beta": beta, "reduction": "none"}
    check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **rules, **options)


# ------------------------------------------------------------------------------- strided vectors


def strided(x: Tensor) -> Tensor:
    return torch.stack((x, torch.zeros_like(x)), 1).flatten()[::2]


def offset(x: Tensor) -> Tensor:
    return torch.cat((x[:1], x))[1:]


@SCHEDULES
@pytest.mark.parametrize("view", [strided, offset], ids=["strided", "offset"])
@pytest.mark.parametrize("name", ["jsd 0", "cross-entropy"])
def test_labels_and_weights_may_be_views(name: str, view: Callable, schedule: str) -> None:
    """Rows of labels and weights, laid out in memory as a caller's slices leave them."""
    pair = make_pair(*SIZES, masked=3, dtype=torch.float32, seed=34)
    loss, inputs, wrt, options = prepare(name, pair, False, None)
    weight = torch.linspace(0.5, 2, SIZES[0])
    labels = "target" if "target" in inputs else "shift_labels"
    how = {**options, "schedule": schedule}
    whole = run(loss.fn, inputs, wrt, token_weight=weight, **how)
    views = {**inputs, labels: view(inputs[labels])}
    assert view is offset or not views[labels].is_contiguous()
    same_bits(whole, run(loss.fn, views, wrt, token_weight=view(weight), **how))
    same = torch.ones(()).expand(SIZES[0])
    once = run(loss.fn, inputs, wrt, token_weight=torch.ones(SIZES[0]), **how)
    same_bits(once, run(loss.fn, inputs, wrt, token_weight=same, **how))
