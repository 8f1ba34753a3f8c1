"""Inputs that break softmax code: -inf, offsets, one-hot rows, no or one token, strides, shapes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_advantage import fused_linear_advantage
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import make_pair, single
from tests.helpers.kernel_cases import SINGLE, STUDENT, check, run

pytestmark = pytest.mark.usefixtures("cpu_backend")

BETAS = [0.0, 0.1, 0.5, 1.0]
CLIPS = [None, 0.05]
LOGPROB_FAMILY = [
    (fused_linear_logprob, reference.linear_logprob, {"return_entropy": True}),
    (fused_linear_cross_entropy, reference.linear_cross_entropy, {"reduction": "none"}),
    (fused_linear_cross_entropy, reference.linear_cross_entropy, {}),
]


def check_both_dtypes(
    fn: Callable, truth: Callable, case: dict[str, Tensor], wrt: tuple, **options: object
) -> None:
    for dtype in (torch.float32, torch.float64):
        check(fn, truth, case, wrt, dtype=dtype, **options)


# Who bans decides which terms are infinite; a clip makes them finite again.
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("banned", ["both", "student", "teacher"])
def test_banned_vocabulary(banned: str, beta: float, clip: float | None) -> None:
    pair = make_pair(19, 12, 70, seed=0)
    for who in ("student", "teacher"):
        if banned in ("both", who):
            pair[f"{who}_bias"][[0, 33, 68, 69]] = float("-inf")
    options = {"beta": beta, "token_clip": clip, "reduction": "none"}
    infinite = clip is None and (banned, beta) in {("student", 0.0), ("teacher", 1.0)}
    if not infinite:
        check_both_dtypes(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **options)
        return
    for reduction in ("none", "mean"):
        values, grads = run(fused_linear_jsd, pair, STUDENT, **{**options, "reduction": reduction})
        assert values[0].isposinf().all()
        for name, grad in grads.items():
            assert grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [20.0, 46.0, 80.0])
@pytest.mark.parametrize(
    ("beta", "banned", "faint"), [(0.0, "student", "teacher"), (1.0, "teacher", "student")]
)
def test_infinite_however_faint_the_other_probability(
    beta: float, banned: str, faint: str, gap: float, dtype: torch.dtype
) -> None:
    """p log(p / 0) is infinite for p = exp(-80) too; a stand-in for log 0 makes it finite."""
    pair = make_pair(7, 12, 70, std=1.0, dtype=dtype, seed=12)
    pair[f"{banned}_bias"][3] = float("-inf")
    pair[f"{faint}_bias"][3] -= gap
    values, grads = run(fused_linear_jsd, pair, STUDENT, beta=beta, reduction="none")
    assert values[0].isposinf().all(), values[0]
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.abs().max() < 1e3, name


# A softcap bounds every logit, so a ban must come after it.
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("fn", "truth", "options"), LOGPROB_FAMILY)
def test_banned_vocabulary_in_one_distribution(
    fn: Callable, truth: Callable, options: dict, softcap: float | None
) -> None:
    case = single(make_pair(19, 12, 70, seed=1))
    case["target"] = case["target"].clamp(1, 67)
    case["bias"][[0, 68, 69]] = float("-inf")
    check_both_dtypes(fn, truth, case, SINGLE, softcap=softcap, **options)


def test_banned_label_has_log_probability_minus_infinity() -> None:
    case = single(make_pair(3, 12, 70, seed=2))
    case["target"] = torch.tensor([4, 5, 6])
    case["bias"][5] = float("-inf")
    logprob = fused_linear_logprob(**case)
    assert logprob[1].isneginf() and logprob[[0, 2]].isfinite().all()


# Offsets that overflow exp in either direction without the row's maximum.
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("offset", [1e3, -1e3])
@pytest.mark.parametrize("beta", BETAS)
def test_offset_logits(beta: float, offset: float, clip: float | None) -> None:
    pair = make_pair(19, 12, 70, offset=offset, seed=3)
    options = {"beta": beta, "token_clip": clip, "reduction": "none"}
    check_both_dtypes(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **options)


# As above, for one head.
@pytest.mark.parametrize("offset", [1e3, -1e3])
@pytest.mark.parametrize(("fn", "truth", "options"), LOGPROB_FAMILY)
def test_offset_logits_in_one_distribution(
    fn: Callable, truth: Callable, options: dict, offset: float
) -> None:
    case = single(make_pair(19, 12, 70, offset=offset, seed=4))
    check_both_dtypes(fn, truth, case, SINGLE, **options)


@pytest.mark.parametrize("spike", [1e3, -1e3])
@pytest.mark.parametrize("beta", BETAS)
def test_a_block_of_the_vocabulary_far_from_the_rest(beta: float, spike: float) -> None:
    """A maximum 1e3 away, met first or last: exp must neither overflow nor lose the sum."""
    for where in (slice(0, 35), slice(35, 70)):
        pair = make_pair(19, 12, 70, seed=5)
        pair["student_bias"][where] += spike
        pair["teacher_bias"][where] += spike
        options = {"beta": beta, "reduction": "none"}
        check_both_dtypes(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **options)


# All the mass on one entry, or on all but one.
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("height", [30.0, -30.0])
def test_one_hot_rows(height: float, beta: float) -> None:
    pair = make_pair(20, 40, 40, kind="onehot", std=height, seed=6)
    options = {"beta": beta, "reduction": "none"}
    check_both_dtypes(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **options)
    case = single(pair)
    # Half of the labels off the peak, or every gradient would be rounding around 1e-23.
    case["target"] = (case["target"] + torch.arange(20) % 2) % 40
    for fn, truth, extra in LOGPROB_FAMILY:
        check_both_dtypes(fn, truth, case, SINGLE, **extra)


# Three ways to have no token, for each set of gradients that would divide by their number.
@pytest.mark.parametrize("names", [(), ("student_input",), STUDENT])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("why", ["labels", "weights", "no rows"])
def test_no_token_left(why: str, beta: float, names: tuple[str, ...]) -> None:
    tokens = 0 if why == "no rows" else 9
    pair = make_pair(tokens, 12, 70, seed=7)
    options: dict[str, object] = {"beta": beta}
    if why == "labels":
        pair["shift_labels"].fill_(-100)
    elif why == "weights":
        options["token_weight"] = torch.zeros(tokens, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        values, grads = run(fused_linear_jsd, pair, names, reduction=reduction, **options)
        assert values[0].shape == ((tokens,) if reduction == "none" else ())
        assert (values[0] == 0).all()
        for name, grad in grads.items():
            assert grad.shape == pair[name].shape and (grad == 0).all(), name


@pytest.mark.parametrize("names", [(), ("input",), SINGLE])
def test_no_token_left_in_one_distribution(names: tuple[str, ...]) -> None:
    case = single(make_pair(9, 12, 70, masked=9))
    for fn, _, options in LOGPROB_FAMILY:
        values, grads = run(fn, case, names, **options)
        assert all((value == 0).all() for value in values)
        assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("names", [("student_input",), STUDENT])
def test_masked_rows_may_hold_anything(names: tuple[str, ...]) -> None:
    pair = make_pair(15, 12, 70, masked=5, seed=8)
    masked = pair["shift_labels"] == -100
    clean = run(fused_linear_jsd, pair, names)
    for name in ("student_input", "teacher_input"):
        pair[name] = torch.where(masked[:, None], torch.nan, pair[name])
    dirty = run(fused_linear_jsd, pair, names)
    assert torch.equal(clean[0][0], dirty[0][0])
    for name in names:
        assert torch.equal(clean[1][name], dirty[1][name]), name
    assert (dirty[1]["student_input"][masked] == 0).all()


def reshape(pair: dict[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    rows = ("student_input", "teacher_input", "shift_labels", "input", "target")
    return {k: v.reshape((*shape, *v.shape[1:])) if k in rows else v for k, v in pair.items()}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 8), (2, 3, 4)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    tokens = torch.Size(shape).numel()
    flat = make_pair(tokens, 12, 70, teacher_hidden=9, masked=tokens // 4, seed=9)
    pair = reshape(flat, shape)
    options = {"reduction": "none", "return_stats": True}
    loss, stats = fused_linear_jsd(**pair, token_clip=0.1, **options)
    assert all(x.shape == shape for x in (loss, *stats.values()))
    check_both_dtypes(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, reduction="none")
    for fn, truth, extra in LOGPROB_FAMILY:
        check_both_dtypes(fn, truth, reshape(single(flat), shape), SINGLE, **extra)
    pair["target"] = pair.pop("shift_labels")
    check_both_dtypes(fused_linear_advantage, reference.linear_advantage, pair, STUDENT)


def strided(x: Tensor) -> Tensor:
    """The same values behind strides that no view(-1, D) can follow."""
    if x.dim() == 1:
        return torch.stack([x, x], 1)[:, 0]
    wide = torch.stack([x, x], -1).transpose(0, 1)
    return wide[..., 0].transpose(0, 1)


@pytest.mark.parametrize("names", [("student_input",), STUDENT])
def test_non_contiguous(names: tuple[str, ...]) -> None:
    pair = reshape(make_pair(24, 12, 70, masked=4, seed=10), (4, 6))
    other = {name: strided(value) for name, value in pair.items()}
    assert not any(value.is_contiguous() for value in other.values())
    straight = run(fused_linear_jsd, pair, names, reduction="none")
    twisted = run(fused_linear_jsd, other, names, reduction="none")
    torch.testing.assert_close(twisted[0][0], straight[0][0], rtol=1e-12, atol=1e-14)
    for name in names:
        torch.testing.assert_close(twisted[1][name], straight[1][name], rtol=1e-12, atol=1e-14)


def test_expanded_upstream_and_transposed_head() -> None:
    pair = make_pair(24, 12, 70, seed=11)
    pair["student_weight"] = pair["student_weight"].T.contiguous().T
    upstream = torch.tensor(0.3, dtype=torch.float64).expand(24)
    check_both_dtypes(
        fused_linear_jsd, reference.linear_jsd, pair, STUDENT, upstream=[upstream], reduction="none"
    )
