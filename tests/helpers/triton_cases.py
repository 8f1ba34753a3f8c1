"""What the tests of the Triton backend share: comparison on a device, by schedule."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import check, move, prepare, run, same_bits

# One name for each kernel's way through; the other public losses call the same operators.
KINDS = ("jsd 0", "jsd 0.1", "jsd 1", "cross-entropy", "logprob and entropy")
EACH = [(name, how) for name in KINDS[:4] for how in ("mean", "none")] + [(KINDS[4], None)]
SCHEDULES = pytest.mark.parametrize("schedule", ["blocked", "streaming"])
TRAINED = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# As in test_cuda: the RMS keeps the house's rule, the worst entry is one draw from a heavy tail.
RULES = {
    torch.float32: {"max_factor": 4.0},
    torch.float16: {"grad_factor": 1.2, "max_factor": 2.0},
}


def compare(
    name: str,
    pair: dict[str, Tensor],
    trained: bool,
    reduction: str | None,
    dtype: torch.dtype,
    device: str,
    **ours: object,
) -> None:
    loss, inputs, wrt, options = prepare(name, pair, trained, reduction)
    fn = policy_gradient(**ours) if name == "policy gradient" else loss.fn
    ours = {} if name == "policy gradient" else ours
    rules = {"dtype": dtype, "device": device, **RULES[dtype]}
    check(fn, loss.truth, inputs, wrt, only_ours=ours, **rules, **options)


def policy_gradient(**run: object) -> Callable:
    def loss(*, target: Tensor, reduction: str = "mean", **p: Tensor) -> Tensor:
        advantage, chosen = fused_linear_advantage(**p, target=target, **run)
        return policy_gradient_loss(advantage, chosen, target, reduction=reduction)

    return loss


def check_nan_stays_nan(name: str, schedule: str, device: str) -> None:
    """A NaN in one row of the hidden states makes that row's value and gradient NaN, no other's."""
    pair = move(make_pair(20, 24, 101, seed=11, dtype=torch.float32), device)
    pair["student_input"][7] = torch.nan
    loss, inputs, wrt, options = prepare(name, pair, False, None)
    fn = policy_gradient(schedule=schedule) if name == "policy gradient" else loss.fn
    more = {} if name == "policy gradient" else {"schedule": schedule}
    values, grads = run(fn, inputs, wrt, **options, **more)
    rows = values[0].isnan().nonzero().flatten().tolist() if values[0].dim() else [7]
    assert rows == [7] and grads[wrt[0]][7].isnan().all()


def check_stays_on_the_current_stream(
    fn: Callable, inputs: dict[str, Tensor], wrt: tuple[str, ...], **options: object
) -> None:
    """A call and its backward finish on a side stream while the default stream is busy."""
    expected = run(fn, inputs, wrt, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(fn, inputs, wrt, **options)  # the stream gets its memory and cuBLAS workspace
    torch.cuda.synchronize()
    torch.cuda._sleep(2**31)  # about a second in which the default stream does nothing else
    blocked = torch.cuda.Event()
    blocked.record()
    with torch.cuda.stream(side):
        values, grads = run(fn, inputs, wrt, **options)
        found = [x.cpu() for x in values], {k: v.cpu() for k, v in grads.items()}
    waited = blocked.query()
    torch.cuda.synchronize()
    same_bits(([x.cpu() for x in expected[0]], move(expected[1], "cpu")), found)
    assert not waited, "the call waited for the default stream"
