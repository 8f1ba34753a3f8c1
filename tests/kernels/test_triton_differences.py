"""Logits kept as 16-bit differences: the gradient's error against float64 is at most 0.2 %.

The truth is float64 autograd over full logits. The kernels write their gradient in float32 here, so
that the error is that of the differences and not of dz's own type.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from opsd_kernels import plan, reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import cast, make_pair
from tests.helpers.kernel_cases import STUDENT, move, run, same_bits

BOUND = 2e-3
BETAS = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
ROWS, VOCAB, PADDED = 4, 1250, 1280
SLICES = [slice(0, 1024), slice(1024, 1250)]


def logits(kind: str) -> tuple[Tensor, Tensor]:
    """(student, teacher) raw logits (ROWS, VOCAB) in float64; "5 %" is a teacher 5 % off."""
    g = torch.Generator().manual_seed(0)
    student = 3.2 * torch.randn(ROWS, VOCAB, generator=g, dtype=torch.float64)
    noise = 3.2 * torch.randn(ROWS, VOCAB, generator=g, dtype=torch.float64)
    if kind.endswith("%"):
        return student, student + float(kind[:-1]) / 100 * noise
    teacher = noise
    if kind == "banned":  # by both in a whole tile and more, by one here and there
        student[:, :600] = teacher[:, :600] = -torch.inf
        student[:, 700:710] = teacher[:, 1100:1110] = -torch.inf
    elif kind == "offset":
        student, teacher = student + 1e3, teacher - 1e3
    elif kind == "one-hot":
        student, teacher = (torch.full((ROWS, VOCAB), -30.0, dtype=torch.float64) for _ in "st")
        student[torch.arange(ROWS), torch.arange(ROWS) * 400] = 30.0
        teacher[torch.arange(ROWS), torch.arange(ROWS) // 2 * 800] = 30.0
    elif kind != "random":
        raise ValueError(kind)
    return student, teacher


def truth(
    pair: tuple[Tensor, Tensor], beta: float, cap: float | None, t: tuple[float, float]
) -> tuple:
    """(value, d value / d raw student logits) of logits that pass an identity as their head."""
    eye = torch.eye(VOCAB, dtype=torch.float64)
    inputs = {"student_weight": eye, "teacher_weight": eye}
    for name, raw in zip(("student", "teacher"), pair, strict=True):
        # The same columns are banned in every row: by the bias, since inf times 0 is NaN.
        inputs[f"{name}_input"] = raw.nan_to_num(neginf=0.0)
        inputs[f"{name}_bias"] = torch.where(raw[0].isinf(), raw[0], 0.0)
    how = {"beta": beta, "reduction": "none"}
    for name, each in zip(("student", "teacher"), t, strict=True):
        # Of a head, softcap and temperature as the kernels have them.
        how[f"{name}_logit_scale"] = 1.0 / each
        how[f"{name}_softcap"] = None if cap is None else cap / each
    values, grads = run(reference.linear_jsd, inputs, STUDENT[:1], [torch.ones(ROWS)], **how)
    return values[0], grads["student_input"]


def by_differences(
    pair: tuple[Tensor, Tensor], beta: float, cap: float | None, t: tuple[float, float],
    device: str, with_labels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from the kernels."""
    from opsd_kernels.backends.passes import FORWARD_KL, JSD, REVERSE_KL, Layout, kl_of
    from opsd_kernels.backends.triton_differences_launch import DifferenceTiles
    from opsd_kernels.backends.triton_rows_launch import StoredTiles
    from opsd_kernels.problem import Head

    raw = torch.stack(pair).float().to(device)
    hidden = raw.new_empty(ROWS, 1)

    def multiplied(columns: slice) -> StoredTiles:
        count = columns.stop - columns.start
        z = raw.new_full((2, ROWS, math.ceil(count / 64) * 64), -torch.inf)
        z[:, :, :count] = raw[:, :, columns]
        weight = raw.new_empty(count, 1)
        return StoredTiles(z, [Head(hidden, weight, None, cap, each) for each in t], hidden)

    kind = {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(beta, JSD)
    layout = Layout(2, True, False, with_labels, kind)
    labels = torch.arange(ROWS, device=device) * 411 if with_labels else None
    student = Head(hidden, raw.new_empty(VOCAB, 1), None, cap, t[0])
    codes = torch.full((2, ROWS, PADDED), torch.nan, dtype=torch.float16, device=device)
    tiles = DifferenceTiles(multiplied, SLICES, codes, hidden, student)
    merged = raw.new_empty(layout.count, ROWS)
    tiles.statistics(layout, labels, 0, merged, None)
    value, totals = tiles.sums(layout, merged, beta, None, None)
    dz = raw.new_full((ROWS, PADDED), torch.nan)
    tiles.divergence_gradient(
        layout, merged, totals, None, beta, None, slice(0, VOCAB), dz
    )  # fmt: skip
    return (value if kind == JSD else kl_of(layout, merged)[0]).cpu(), dz[:, :VOCAB].cpu()


def error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


def check(
    pair: tuple,
    beta: float,
    device: str,
    cap: float | None = None,
    t: tuple[float, float] = (1.0, 1.0),
) -> None:
    exact = tuple(x.float().double() for x in pair)
    value, grad = truth(exact, beta, cap, t)
    for with_labels in (True, False):
        found, dz = by_differences(exact, beta, cap, t, device, with_labels)
        assert error(dz, grad) <= BOUND
        # A value is a sum of products of both models' roundings.
        torch.testing.assert_close(found.double(), value, rtol=BOUND, atol=1e-6)


@BETAS
@pytest.mark.parametrize("kind", ["random", "5%", "0.5%", "0.05%", "offset"])
def test_gradient(kind: str, beta: float, triton_device: str) -> None:
    check(logits(kind), beta, triton_device)


@BETAS
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_softcap(cap: float, beta: float, triton_device: str) -> None:
    check(logits("random"), beta, triton_device, cap)


@BETAS
@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (2.0, 0.8)])
@pytest.mark.parametrize("kind", ["random", "5%"])
def test_temperatures(
    kind: str, temperatures: tuple[float, float], beta: float, triton_device: str
) -> None:
    """The teacher's own where one of the heads scales its logits."""
    check(logits(kind), beta, triton_device, t=temperatures)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_banned_vocabulary(beta: float, triton_device: str) -> None:
    check(logits("banned"), beta, triton_device)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_infinite_kl_has_a_finite_gradient(beta: float, triton_device: str) -> None:
    value, dz = by_differences(logits("banned"), beta, None, (1.0, 1.0), triton_device, True)
    assert value.isposinf().all() and dz.isfinite().all()


@BETAS
def test_one_hot_rows(beta: float, triton_device: str) -> None:
    check(logits("one-hot"), beta, triton_device)


# ------------------------------------------------------------------------- the whole way of a call


# A shared head forms its difference once; each beta and a trained head use it differently.
@pytest.mark.parametrize("shared", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_call(beta: float, trained: bool, shared: bool, triton_device: str) -> None:
    pair = cast(make_pair(9, 16, 1300, masked=2, seed=3), torch.float16)
    if shared:
        pair["teacher_weight"] = pair["student_weight"]
    wrt = STUDENT[:2] if trained else STUDENT[:1]
    how = {"beta": beta, "reduction": "sum", "return_stats": True}

    def first(fn: object, tensors: dict[str, Tensor], **more: object) -> tuple:
        return run(lambda **p: fn(**p)[0], tensors, wrt, **how, **more)

    there = move(pair, triton_device)
    ours = first(fused_linear_jsd, there, precision="difference")
    same_bits(ours, first(fused_linear_jsd, there, precision="difference"))
    true = first(reference.linear_jsd, cast(pair, torch.float64))
    assert error(ours[0][0].cpu(), true[0][0]) <= 1e-3
    for name in wrt:
        assert error(ours[1][name].cpu(), true[1][name]) <= BOUND, name


def test_who_may_ask_for_differences() -> None:
    half = {"device": "cuda", "dtype": torch.bfloat16}
    large = (8192, 4096, 151936)
    asked = plan(*large, **half, precision="difference")
    assert asked.precision == "difference" and "16-bit differences" in str(asked)
    # On an H100 they were slower.
    assert plan(*large, **half).precision == "fp32"
    # Whatever the workspace, a slice's fp32 logits stay in L2, and dh finds room in them or beside.
    for mib in (64, 512, 2048, 65536):
        for hidden in (64, 4096, 16384):
            p = plan(
                65536, hidden, 151936, **half, precision="difference", workspace_bytes=mib << 20
            )
            assert 2 * 4 * p.rows_per_block * p.slice_columns <= 36 << 20
            assert p.workspace_bytes <= mib << 20 and p.slice_columns % 512 == 0
    for wrong in (
        {**half, "dtype": torch.float32}, {**half, "loss": "logprob"}, {**half, "clipped": True},
        {**half, "device": "cpu"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="precision: 'difference' needs"):
            plan(*large, **wrong, precision="difference")
        assert plan(*large, **wrong).precision == "fp32"
    for schedule in ("tiled", "streaming"):
        with pytest.raises(ValueError, match="precision: 'difference' is a way of 'blocked'"):
            plan(*large, **half, schedule=schedule, precision="difference")


# --------------------------------------------------------------- the arithmetic in PyTorch, at size


def in_pytorch(z_s: Tensor, z_t: Tensor, beta: float, tile: int = 1024) -> Tensor:
    """dz of the JSD or a KL from differences, in float64 apart from the two roundings."""
    log_s, d = [], []
    lse_s, lse_t = z_s.logsumexp(-1, keepdim=True), z_t.logsumexp(-1, keepdim=True)
    for a, b in zip(z_s.split(tile, 1), z_t.split(tile, 1), strict=True):
        top_s, top_t = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
        gap = (b - a) - (top_t - top_s)
        larger = torch.where(gap > 0, b - top_t, a - top_s).half().double()
        gap = gap.half().double()
        log_s.append(larger - gap.clamp(min=0) + top_s - lse_s)
        d.append(gap + (top_t - top_s) - (lse_t - lse_s))
    s, d = torch.cat(log_s, 1).exp(), torch.cat(d, 1)
    if beta == 0.0:
        return s - s * d.exp()
    q = -d if beta == 1.0 else torch.log1p(beta * torch.expm1(d.clamp(-80, 80)))
    mean = (s * q).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    return s * (q - mean) if beta == 1.0 else (1 - beta) * s * (mean - q)


@pytest.mark.parametrize(
    ("noise", "beta"), itertools.product([1.0, 0.05, 0.005, 0.0005], [0, 0.5, 1])
)
def test_in_pytorch_at_the_size_of_a_model(noise: float, beta: float) -> None:
    g = torch.Generator().manual_seed(1)
    z_s, z_t = (3.2 * torch.randn(32, 49152, generator=g, dtype=torch.float64) for _ in "st")
    if noise < 1:
        z_t = z_s + noise * z_t
    leaf = z_s.clone().requires_grad_()
    log_s, log_t = leaf.log_softmax(-1), z_t.log_softmax(-1)
    if beta == 0:
        value = (log_t.exp() * (log_t - log_s)).sum()
    elif beta == 1:
        value = (log_s.exp() * (log_s - log_t)).sum()
    else:
        log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
        value = beta * (log_t.exp() * (log_t - log_m)).sum()
        value = value + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum()
    (true,) = torch.autograd.grad(value, leaf)
    assert error(in_pytorch(z_s, z_t, float(beta)), true) <= BOUND
