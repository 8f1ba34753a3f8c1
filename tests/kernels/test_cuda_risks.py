"""What Triton's interpreter cannot show: tf32, long sums on tensor cores, TMA, alignment, NaN."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import STUDENT, check, move, prepare, run, same_bits
from tests.helpers.triton_cases import KINDS, SCHEDULES, TRAINED, check_nan_stays_nan, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
LOW = {"dtype": torch.bfloat16, "device": DEVICE, "grad_factor": 1.2, "max_factor": 2.0}


@pytest.fixture(autouse=True)
def fp32_precision() -> Iterator[None]:
    """Each test may set tf32 by the newer setting."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    yield
    matmul.fp32_precision = before


@SCHEDULES
@TRAINED
@pytest.mark.parametrize("name", KINDS)
def test_fp32_without_tf32(name: str, trained: bool, schedule: str) -> None:
    """The yardstick rounds no operand to the 11 bits of tf32."""
    pair = make_pair(130, 2048, 1003, masked=9, seed=5)
    compare(name, pair, trained, None, torch.float32, "cuda", schedule=schedule)


def test_tf32_by_the_newer_setting() -> None:
    """Streaming's products take it where it is allowed, and only there."""
    pair = move(make_pair(130, 2048, 1003, dtype=torch.float32, seed=5), DEVICE)
    options = {"schedule": "streaming", "reduction": "none"}
    exact = fused_linear_jsd(**pair, **options)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    rounded = fused_linear_jsd(**pair, **options)
    error = ((rounded - exact).abs().max() / exact.abs().max()).item()
    assert 1e-6 < error < 1e-2


# Vocabularies of whole tiles and odd ones, a hidden size as models have it: 64 steps of a sum,
# beyond what TMA's pipeline holds. cuBLAS in the same dtype is the yardstick.
@TRAINED
@pytest.mark.parametrize("shape", [(256, 4096, 4096), (300, 4096, 5003)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_over_a_long_sum(name: str, shape: tuple, trained: bool) -> None:
    pair = make_pair(*shape, masked=9, seed=6)
    loss, inputs, wrt, options = prepare(name, pair, trained, None)
    check(loss.fn, loss.truth, inputs, wrt, only_ours={"schedule": "streaming"}, **LOW, **options)


@TRAINED
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_shared_head_over_a_long_sum(beta: float, trained: bool) -> None:
    def shared(**p: Tensor) -> Tensor:
        p["teacher_weight"] = p["student_weight"]
        return fused_linear_jsd(**p, schedule="streaming")

    pair = make_pair(300, 4096, 5003, kind="close", masked=9, seed=7)
    wrt = STUDENT if trained else STUDENT[:1]
    check(shared, reference.linear_jsd, pair, wrt, **LOW, beta=beta, reduction="none")


# The teacher's block of logits follows the student's: of an odd width, and of a head cut to one,
# its rows would start anywhere. The blocks are of several sizes.
@SCHEDULES
@TRAINED
@pytest.mark.parametrize(("vocab", "kept"), [(50257, None), (50304, 50257), (4096, 4091)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_odd_vocabulary(
    beta: float, vocab: int, kept: int | None, trained: bool, schedule: str
) -> None:
    pair = make_pair(200, 64, vocab, masked=9, seed=8)
    pair["shift_labels"] = pair["shift_labels"].clamp(max=(kept or vocab) - 1)
    ours = {"schedule": schedule, "workspace_bytes": 70 * 3 * vocab * 4}
    options = {"beta": beta, "vocab_size": kept, "reduction": "none"}
    wrt = STUDENT if trained else STUDENT[:1]
    check(fused_linear_jsd, reference.linear_jsd, pair, wrt, only_ours=ours, **LOW, **options)


@SCHEDULES
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_operands_that_start_anywhere(offset: int, schedule: str) -> None:
    """Rows that neither a load of 16 bytes nor TMA can read, and rows that both can."""

    def moved(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)

    def ours(**p: Tensor) -> Tensor:
        there = {name: moved(x) for name, x in p.items()}
        return fused_linear_jsd(**there, reduction="none", schedule=schedule)

    def truth(**p: Tensor) -> Tensor:
        return reference.linear_jsd(**p, reduction="none")

    check(ours, truth, make_pair(130, 64, 1003, masked=9, seed=9), STUDENT, **LOW)


@SCHEDULES
@pytest.mark.parametrize("name", KINDS)
def test_nan_stays_nan(name: str, schedule: str) -> None:
    check_nan_stays_nan(name, schedule, "cuda")


# --------------------------------------------------------- settings that refuse, and other devices


def test_a_divisor_of_the_cpu() -> None:
    pair = move(make_pair(96, 64, 1111, masked=9, seed=10, dtype=torch.float32), DEVICE)
    expected = run(fused_linear_jsd, pair, STUDENT, num_tokens=37)
    for shape in ((), (1,), (1, 1)):
        divisor = torch.full(shape, 37)
        same_bits(expected, run(fused_linear_jsd, pair, STUDENT, num_tokens=divisor))


@TRAINED
def test_tunable_products_work_or_are_refused_by_name(trained: bool) -> None:
    pair = move(make_pair(96, 64, 1111, masked=9, seed=11, dtype=torch.bfloat16), DEVICE)
    wrt = STUDENT if trained else STUDENT[:1]
    expected, right = run(fused_linear_jsd, pair, wrt)
    torch.cuda.tunable.enable(True)
    torch.cuda.tunable.tuning_enable(False)
    try:
        values, grads = run(fused_linear_jsd, pair, wrt)
    except RuntimeError as error:
        assert str(error).startswith("torch.cuda.tunable: ")
        return
    finally:
        torch.cuda.tunable.enable(False)
    torch.testing.assert_close(values[0], expected[0])
    for name in wrt:
        torch.testing.assert_close(grads[name], right[name])


def test_float16_sums_are_refused_by_name() -> None:
    pair = move(make_pair(96, 64, 1111, seed=12, dtype=torch.float16), DEVICE)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = True
    try:
        with pytest.raises(RuntimeError, match=r"^torch.backends.cuda.matmul.allow_fp16_accum"):
            run(fused_linear_jsd, pair, STUDENT[:1])
    finally:
        matmul.allow_fp16_accumulation = before
