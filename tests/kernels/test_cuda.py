"""Every loss on a CUDA device: accuracy, bits, products, streams, compile.

The truth is float64 autograd over full logits on the CPU. The yardstick is plain PyTorch in the
same dtype on the same device, under the same matmul settings.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import cast, make_pair
from tests.helpers import compiled
from tests.helpers.gemm_counter import case, gemms
from tests.helpers.kernel_cases import (
    LOSSES,
    PER_TOKEN,
    REDUCED,
    STUDENT,
    check,
    move,
    prepare,
    run,
    same_bits,
)
from tests.helpers.triton_cases import check_stays_on_the_current_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("ieee_float32"),
]
DEVICE = torch.device("cuda")
# As test_low_precision explains: the RMS gets 1.2, the worst entry is one draw from a heavy tail.
LOW = {"grad_factor": 1.2, "max_factor": 2.0}
# fp32's tail is heavier: of the JSD at 8 seeds the worst entry's ratio was 0.6 to 3.2, the RMS' 0.6
# to 1.1. The RMS keeps the house's 2.
RULES = {torch.float32: {"max_factor": 4.0}, torch.bfloat16: LOW, torch.float16: LOW}
DTYPES = list(RULES)
EACH = [(name, how) for name in REDUCED for how in ("mean", "none")]
EACH += [(name, None) for name in PER_TOKEN]
TRAINED = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
IN_EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
IN_TWO_DTYPES = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)


def compare(
    name: str, pair: dict[str, Tensor], trained: bool, reduction: str | None, dtype: torch.dtype
) -> None:
    loss, inputs, wrt, options = prepare(name, pair, trained, reduction)
    rules = {"dtype": dtype, "device": DEVICE, **RULES[dtype]}
    check(loss.fn, loss.truth, inputs, wrt, **rules, **options)


# ----------------------------------------------------------------------------------------- accuracy


@IN_EACH_DTYPE
@TRAINED
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_accuracy(name: str, reduction: str | None, trained: bool, dtype: torch.dtype) -> None:
    compare(name, make_pair(96, 64, 1111, masked=9), trained, reduction, dtype)


@IN_TWO_DTYPES
@TRAINED
@pytest.mark.parametrize("name", ["jsd 0", "jsd 0.5", "cross-entropy"])
def test_wide_vocabulary(name: str, trained: bool, dtype: torch.dtype) -> None:
    compare(name, make_pair(300, 96, 50257, masked=31, seed=1), trained, "none", dtype)


# Sizes below one tile, just over one, and over several.
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (33, 7, 257), (130, 64, 1003)])
@pytest.mark.parametrize("name", LOSSES)
def test_odd_shapes(name: str, shape: tuple[int, int, int]) -> None:
    compare(name, make_pair(*shape, seed=2), True, None, torch.float32)


@IN_EACH_DTYPE
@TRAINED
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_shared_head_on_close_pairs(beta: float, trained: bool, dtype: torch.dtype) -> None:
    def shared(**p: Tensor) -> Tensor:
        p["teacher_weight"] = p["student_weight"]
        return fused_linear_jsd(**p)

    pair = make_pair(96, 64, 1111, kind="close", masked=9, seed=3)
    wrt = STUDENT if trained else STUDENT[:1]
    options = {"beta": beta, "reduction": "none", **RULES[dtype]}
    check(shared, reference.linear_jsd, pair, wrt, dtype=dtype, device=DEVICE, **options)


@TRAINED
def test_every_option_and_statistic(trained: bool) -> None:
    pair = make_pair(48, 32, 300, teacher_hidden=20, masked=5, seed=4)
    pair["shift_labels"] = pair["shift_labels"].clamp(max=289)
    weight = torch.linspace(0, 2, 48, dtype=torch.float64)
    options = {"token_weight": weight, "num_tokens": torch.tensor(57.0), "return_stats": True}
    options |= {"student_softcap": 9.0, "teacher_softcap": 7.0, "temperature": 1.3}
    options |= {"token_clip": 0.05, "vocab_size": 290}

    def flatly(fn: Callable) -> Callable:
        return lambda **p: compiled.flat(fn(**p, **move(options, p["student_input"].device)))

    wrt = STUDENT if trained else STUDENT[:1]
    check(flatly(fused_linear_jsd), flatly(reference.linear_jsd), pair, wrt, device=DEVICE)


@pytest.mark.parametrize("name", ["jsd 0.5", "cross-entropy"])
def test_tf32_is_respected(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuBLAS has no tf32 kernel for an odd row of the yardstick's logits.
    compare(name, make_pair(130, 64, 1024, seed=5), True, "none", torch.float32)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_equals_casting_by_hand(trained: bool) -> None:
    pair = move(make_pair(48, 32, 300, masked=4, dtype=torch.float32), DEVICE)
    pair = {k: v for k, v in pair.items() if not k.endswith("bias")}
    wrt = STUDENT[:2] if trained else STUDENT[:1]

    def cast_for_me(**p: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return fused_linear_jsd(**p)

    found, grads = run(cast_for_me, pair, wrt)
    expected, by_hand = run(fused_linear_jsd, cast(pair, torch.bfloat16), wrt)
    assert torch.equal(found[0], expected[0])
    for name in wrt:
        assert grads[name].dtype == torch.float32
        assert torch.equal(grads[name], by_hand[name].float()), name


# ----------------------------------------------------------------------------- inputs that break it


# Each end of beta has its own kernel; who bans decides which terms are infinite.
@IN_TWO_DTYPES
@pytest.mark.parametrize("banned", ["both", "student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_banned_vocabulary(beta: float, banned: str, dtype: torch.dtype) -> None:
    pair = make_pair(96, 64, 1111, seed=6)
    for who in ("student", "teacher"):
        if banned in ("both", who):
            pair[f"{who}_bias"][[0, 33, 700, 1110]] = float("-inf")
    options = {"beta": beta, "reduction": "none"}
    if (banned, beta) not in {("student", 0.0), ("teacher", 1.0)}:
        rules = {"device": DEVICE, "dtype": dtype, **RULES[dtype]}
        check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **rules, **options)
        return
    values, grads = run(fused_linear_jsd, move(cast(pair, dtype), DEVICE), STUDENT, **options)
    assert values[0].isposinf().all()
    for name, grad in grads.items():
        assert grad.isfinite().all(), name


@IN_TWO_DTYPES
@pytest.mark.parametrize("name", ["logprob and entropy", "cross-entropy"])
def test_banned_vocabulary_in_one_distribution(name: str, dtype: torch.dtype) -> None:
    pair = make_pair(96, 64, 1111, seed=7)
    pair["shift_labels"] = pair["shift_labels"].clamp(1, 1108)
    pair["student_bias"][[0, 1109, 1110]] = float("-inf")
    loss, inputs, wrt, options = prepare(name, pair, True, None)
    if name == "cross-entropy":
        options = {}  # smoothing over a banned entry is infinite
    rules = {"device": DEVICE, "dtype": dtype, **RULES[dtype]}
    check(loss.fn, loss.truth, inputs, wrt, **rules, **options)


# Offsets that overflow exp in either direction without the row's maximum.
@IN_TWO_DTYPES
@pytest.mark.parametrize("offset", [1e3, -1e3])
@pytest.mark.parametrize("name", LOSSES)
def test_offset_logits(name: str, offset: float, dtype: torch.dtype) -> None:
    compare(name, make_pair(96, 64, 1111, offset=offset, seed=8), True, None, dtype)


@TRAINED
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_all_masked(name: str, reduction: str | None, trained: bool) -> None:
    pair = move(make_pair(9, 16, 1111, masked=9, seed=9, dtype=torch.bfloat16), DEVICE)
    loss, inputs, wrt, options = prepare(name, pair, trained, reduction)
    values, grads = run(loss.fn, inputs, wrt, **options)
    assert all((value == 0).all() for value in values)
    for key in wrt:
        assert grads[key].shape == inputs[key].shape and (grads[key] == 0).all(), key


@TRAINED
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_masked_rows_may_hold_anything(name: str, reduction: str | None, trained: bool) -> None:
    pair = move(make_pair(33, 16, 257, masked=11, seed=10, dtype=torch.bfloat16), DEVICE)
    masked = pair["shift_labels"] == -100
    dirty = dict(pair)
    for key in ("student_input", "teacher_input"):
        dirty[key] = torch.where(masked[:, None], torch.nan, pair[key])
    loss, inputs, wrt, options = prepare(name, pair, trained, reduction)
    clean = run(loss.fn, inputs, wrt, **options)
    values, grads = run(loss.fn, loss.inputs(dirty), wrt, **options)
    same_bits(clean, (values, grads))
    assert (grads[wrt[0]][masked] == 0).all() and (grads[wrt[0]][~masked] != 0).any()


def test_wrong_labels_and_devices_are_named() -> None:
    """A ValueError, not a device-side assertion, after which no call would work any more."""
    pair = move(make_pair(9, 16, 70, dtype=torch.float32), DEVICE)
    wrong = pair["shift_labels"].clone()
    wrong[4] = 70
    with pytest.raises(ValueError, match=r"\[0, 70\) or ignore_index, got 70 at token 4"):
        fused_linear_jsd(**{**pair, "shift_labels": wrong})
    for name in ("shift_labels", "student_weight", "student_bias"):
        with pytest.raises(ValueError, match=f"{name}: expected on {DEVICE}"):
            fused_linear_jsd(**{**pair, name: pair[name].cpu()})
    assert fused_linear_jsd(**pair).isfinite()


# ------------------------------------------------------------------- bits, products, compile, waits


@IN_EACH_DTYPE
@TRAINED
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_two_runs_give_the_same_bits(
    name: str, reduction: str | None, trained: bool, dtype: torch.dtype
) -> None:
    pair = move(make_pair(300, 96, 5003, masked=31, seed=11, dtype=dtype), DEVICE)
    loss, inputs, wrt, options = prepare(name, pair, trained, reduction)
    first = run(loss.fn, inputs, wrt, **options)
    # Other work in between, so that the second run's buffers are others and hold other bytes.
    dirt = [torch.full((n, 5003), torch.nan, device=DEVICE) for n in (1, 7, 300)]
    del dirt
    same_bits(first, run(loss.fn, inputs, wrt, **options))


# One row for each promise of the plan, in a dtype stored as fp32 and one stored in 16 bits.
@pytest.mark.parametrize(
    ("names", "reduction", "expected"),
    [((), "mean", 2), (STUDENT[:1], "none", 3), (STUDENT[:2], "mean", 4), (STUDENT[:2], "none", 6)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemm_count(names: tuple, reduction: str, expected: int, dtype: torch.dtype) -> None:
    pair = move(cast(case(), dtype), DEVICE)
    upstream = [torch.ones(96)] if reduction == "none" else None  # tokens of 0 are left out
    found = gemms(lambda: run(fused_linear_jsd, pair, names, upstream, reduction=reduction))
    assert found == pytest.approx(expected)


COMPILED = [fn for fn in compiled.FUNCTIONS if fn is not compiled.jsd_options]


@TRAINED
@pytest.mark.parametrize("fn", COMPILED)
def test_compiled_equals_eager(fn: Callable, trained: bool) -> None:
    torch._dynamo.reset()
    traced = torch.compile(fn, fullgraph=True, backend="aot_eager")
    pair = move(compiled.case(), DEVICE)
    compiled.equal_bits(fn, traced, pair, STUDENT if trained else STUDENT[:1])


@pytest.mark.slow
@TRAINED
@pytest.mark.parametrize("fn", [compiled.forward_kl, compiled.reverse_kl])
def test_inductor(fn: Callable, trained: bool) -> None:
    """Sum and none: Triton's own division by the token count may round the mean otherwise."""
    torch._dynamo.reset()
    wrt = STUDENT if trained else STUDENT[:1]
    pair = move(compiled.case(dtype=torch.bfloat16), DEVICE)
    eager, eager_grads = run(fn, pair, wrt)
    found, grads = run(torch.compile(fn, fullgraph=True), pair, wrt)
    summed_outside = fn is compiled.forward_kl and not trained
    torch.testing.assert_close(found[0], eager[0], rtol=1e-6 if summed_outside else 0, atol=0)
    same_bits(([], eager_grads), ([], grads))


@TRAINED
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_without_labels_the_host_never_waits(beta: float, reduction: str, trained: bool) -> None:
    """Labels must be read to be checked and compacted; nothing else may stall the device."""
    pair = move(make_pair(96, 64, 1111, dtype=torch.bfloat16), DEVICE)
    del pair["shift_labels"]
    leaves = [pair[name].requires_grad_() for name in (STUDENT if trained else STUDENT[:1])]

    def step() -> None:
        loss = fused_linear_jsd(**pair, beta=beta, reduction=reduction)
        torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    step()  # libraries load and wait here
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@TRAINED
@pytest.mark.parametrize("name", ["jsd 0.5", "logprob and entropy", "policy gradient"])
def test_work_stays_on_the_current_stream(name: str, trained: bool) -> None:
    pair = move(make_pair(96, 64, 1111, masked=9, seed=12, dtype=torch.float32), DEVICE)
    loss, inputs, wrt, options = prepare(name, pair, trained, None)
    check_stays_on_the_current_stream(loss.fn, inputs, wrt, **options)
