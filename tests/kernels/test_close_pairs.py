"""16-bit inputs: gradients within 0.5 % of float64 where teacher and student nearly agree.

The teacher is the student with noise of 1e-3 on its hidden states, as late in self-distillation.
Logits rounded to 16 bits would differ by their rounding instead (a JSD gradient 90 % and more off).
"""

import pytest
import torch
from torch import Tensor

from opsd_kernels import plan, reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import assert_close, cast, make_pair
from tests.helpers.kernel_cases import LOSSES, PER_TOKEN, move, prepare, run

BOUND = 5e-3


def close(name: str, trained: bool, dtype: torch.dtype, device: str = "cpu", **how: object) -> None:
    """Gradients of hidden states, weight and bias, against autograd in float64."""
    how_close = {"kind": "close", "noise": 1e-3, "std": 1.0, "masked": 3, "seed": 2}
    pair = cast(make_pair(20, 24, 500, **how_close), dtype)
    # Flat rows, whose dz lie below fp16's smallest number; scaled, as GradScaler does, what comes
    # out does not.
    reduction, upstream = (None, None) if name in PER_TOKEN else ("sum", [1024.0])
    loss, inputs, wrt, options = prepare(name, pair, trained, reduction)
    _, ours = run(loss.fn, move(inputs, device), wrt, upstream, **options, **how)
    _, true = run(loss.truth, cast(inputs, torch.float64), wrt, upstream, **options)
    for key in wrt:
        error = (ours[key].cpu().double() - true[key]).norm() / true[key].norm()
        assert error < BOUND, f"{key}: {error:.2%} off"


# Close pairs cancel: both 16-bit dtypes lose digits there, in each loss and each kind of gradient.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str, trained: bool, dtype: torch.dtype, cpu_backend: str) -> None:
    close(name, trained, dtype)


# Triton's interpreter computes bfloat16 wrongly. `tiled` makes a frozen head's JSD in its own way.
@pytest.mark.parametrize(
    ("name", "schedule", "trained"),
    [
        ("jsd 0.5", "blocked", True),
        ("jsd 0.5", "tiled", False),
        ("jsd 0.1", "streaming", True),
        ("forward kl", "blocked", False),
        ("reverse kl", "tiled", True),
        ("cross-entropy", "streaming", False),
    ],
)
def test_triton(name: str, schedule: str, trained: bool, triton_device: str) -> None:
    close(name, trained, torch.float16, triton_device, schedule=schedule)


def large(dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits of about 1e5, which a scale of 2**-15 brings to the size of others."""
    pair = make_pair(20, 24, 131, masked=3, seed=4)
    factors = {"input": 128.0, "weight": 256.0, "bias": 2.0**15}
    pair = {k: v * factors.get(k.split("_")[1], 1) for k, v in pair.items()}
    logits = pair["student_input"] @ pair["student_weight"].T
    assert logits.abs().max() > 1e5 and (logits.abs() > 65504).sum() > 50
    return cast(pair, dtype)


def test_logits_that_float16_cannot_hold(place: tuple[str, str]) -> None:
    device, schedule = place
    pair = large(torch.float16)
    how = {"student_logit_scale": 2.0**-15, "teacher_logit_scale": 2.0**-15}
    wrt = ("student_input", "student_weight")
    scaled = [2.0**12]  # as GradScaler does: an fp16 gradient of 1e-7 has no digits
    there = move(pair, device)
    values, grads = run(fused_linear_jsd, there, wrt, scaled, **how, schedule=schedule)
    truth, true = run(reference.linear_jsd, cast(pair, torch.float64), wrt, scaled, **how)
    assert_close(values[0].cpu(), truth[0], floor=1e-5, name="value")
    for name in wrt:
        error = (grads[name].cpu().double() - true[name]).norm() / true[name].norm()
        assert error < BOUND, f"{name}: {error:.2%} off"


def test_unscaled_logits_of_100000_stay_finite(place: tuple[str, str]) -> None:
    """The mean over many tokens fits fp16, though a token's own gradient would not."""
    device, schedule = place
    wrt = ("student_input", "student_weight")
    how = {"beta": 1.0, "num_tokens": 1e9, "schedule": schedule}
    values, grads = run(fused_linear_jsd, move(large(torch.float16), device), wrt, **how)
    assert values[0].isfinite() and all(grad.isfinite().all() for grad in grads.values())


def test_the_plan_says_what_is_converted() -> None:
    how = {"backend": "torch", "dtype": torch.float16}
    chosen = plan(1000, 256, 32768, **how)
    assert 0 < chosen.widened_rows < 32768 and chosen.workspace_bytes <= 256 << 20
    assert f"3 GEMMs in fp32 (16-bit heads converted {chosen.widened_rows} rows" in str(chosen)
    for dtype, backend in ((torch.float32, "torch"), (torch.bfloat16, "cpp")):
        assert plan(1000, 256, 32768, dtype=dtype, backend=backend).widened_rows == 0
    assert plan(1000, 256, 32768, dtype=torch.float16, backend="cpp").widened_rows > 0
    # What backward scales stays in fp32.
    assert chosen.accumulator_bytes == 1000 * 256 * 4
    trained = plan(1000, 256, 32768, **how, grad_weight=True)
    assert trained.accumulator_bytes == (1000 + 32768) * 256 * 4
