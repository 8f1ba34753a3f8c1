"""Schedules and precisions on a CUDA device: bf16, bits, memory, many tokens.

`blocked` in fp32 is what test_cuda runs.
"""

import pytest
import torch

from opsd_kernels import plan, reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.layouts import even_blocks
from opsd_kernels.testing import assert_close, cast, make_pair
from tests.helpers.kernel_cases import LOSSES, STUDENT, check, move, prepare, run, same_bits
from tests.helpers.triton_cases import TRAINED, policy_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
MIB = 1 << 20
LOW = {"dtype": torch.bfloat16, "device": DEVICE, "grad_factor": 1.2, "max_factor": 2.0}
EACH = pytest.mark.parametrize(
    "how",
    [
        {"schedule": "streaming"},
        {"schedule": "tiled", "workspace_bytes": 8 * MIB},
        {"schedule": "blocked", "precision": "difference", "workspace_bytes": 8 * MIB},
    ],
    ids=["streaming", "tiled", "difference"],
)


@TRAINED
# Whole tiles by descriptors, ragged ones, and a hidden size that only pointers can read.
@pytest.mark.parametrize("shape", [(256, 128, 1024), (300, 96, 5003), (130, 67, 1111)], ids=str)
@EACH
@pytest.mark.parametrize("name", LOSSES)
def test_accuracy_in_bfloat16(name: str, how: dict, shape: tuple, trained: bool) -> None:
    if "precision" in how and "jsd" not in name and "kl" not in name:
        pytest.skip("differences are of a pair's logits")
    pair = make_pair(*shape, masked=9)
    loss, inputs, wrt, options = prepare(name, pair, trained, None)
    fn = policy_gradient(**how) if name == "policy gradient" else loss.fn
    ours = {} if name == "policy gradient" else how
    check(fn, loss.truth, inputs, wrt, only_ours=ours, **LOW, **options)


@TRAINED
@EACH
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_shared_head_in_bfloat16(beta: float, how: dict, trained: bool) -> None:
    def shared(**p: torch.Tensor) -> torch.Tensor:
        p["teacher_weight"] = p["student_weight"]
        return fused_linear_jsd(**p, **how)

    pair = make_pair(300, 128, 5003, kind="close", masked=9, seed=3)
    wrt = STUDENT if trained else STUDENT[:1]
    check(shared, reference.linear_jsd, pair, wrt, **LOW, beta=beta, reduction="none")


@EACH
@pytest.mark.parametrize("trained", [False, True])
def test_two_runs_give_the_same_bits(trained: bool, how: dict) -> None:
    pair = move(make_pair(1000, 256, 20011, dtype=torch.bfloat16, masked=31), DEVICE)
    wrt = STUDENT if trained else STUDENT[:1]
    first = run(fused_linear_jsd, pair, wrt, **how)
    same_bits(first, run(fused_linear_jsd, pair, wrt, **how))


@pytest.mark.parametrize("masked", [0, 31])
@pytest.mark.parametrize("name", ["jsd 0.1", "jsd 0", "cross-entropy"])
def test_launches_of_tiled_repeated_by_later_blocks(name: str, masked: int) -> None:
    """Several blocks of more than one size: right, and the same bits twice."""
    pair = make_pair(1000, 256, 20011, masked=masked)
    how = {"schedule": "tiled", "workspace_bytes": 4 * MIB}
    kind = {"loss": "logprob"} if name == "cross-entropy" else {"two_passes": name == "jsd 0.1"}
    promised = plan(1000, 256, 20011, device="cuda", dtype=torch.bfloat16, **kind, **how)
    assert len(set(even_blocks(1000 - masked, promised.rows_per_block))) > 1
    loss, inputs, wrt, options = prepare(name, pair, False, None)
    check(loss.fn, loss.truth, inputs, wrt, only_ours=how, **LOW, **options)
    there = move(cast(inputs, torch.bfloat16), DEVICE)
    first = run(loss.fn, there, wrt, **how, **options)
    same_bits(first, run(loss.fn, there, wrt, **how, **options))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["blocked", "tiled", "streaming"])
def test_64k_tokens(schedule: str) -> None:
    """More logits than 2**33: extra memory stays the plan's, and the last rows are right."""
    tokens, hidden, vocab, rows = 65536, 256, 151936, [0, 40000, 65535]
    pair = cast(make_pair(tokens, hidden, vocab, seed=13), torch.bfloat16)
    few = {k: v[rows] if k.endswith(("input", "labels")) else v for k, v in pair.items()}
    options = {"reduction": "none", "beta": 0.5}
    there, upstream = move(pair, DEVICE), torch.zeros(tokens, device=DEVICE)
    upstream[rows] = 1.0
    # What a process allocates once: workspaces of cuBLAS, for this thread and for autograd's.
    run(fused_linear_jsd, move(few, DEVICE), STUDENT[:1], **options, schedule=schedule)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    names = STUDENT[:1]
    values, grads = run(fused_linear_jsd, there, names, [upstream], **options, schedule=schedule)
    extra = torch.cuda.max_memory_allocated() - before
    how = {"dtype": torch.bfloat16, "device": "cuda", "schedule": schedule, "reduced": False}
    promised = plan(tokens, hidden, vocab, **how).workspace_bytes
    # The gradient, its scaled copy, and statistics of every row.
    assert extra <= promised + 4 * tokens * hidden * 2 + 64 * MIB
    ones = [torch.ones(len(rows))]
    true, true_grads = run(reference.linear_jsd, cast(few, torch.float64), names, ones, **options)
    plain, plain_grads = run(reference.linear_jsd, move(few, DEVICE), names, ones, **options)
    assert_close(values[0][rows].cpu(), true[0], plain[0].cpu(), name="values")
    found = grads["student_input"][rows].cpu()
    truth, yardstick = true_grads["student_input"], plain_grads["student_input"].cpu()
    assert_close(found, truth, yardstick, factor=1.2, max_factor=2.0, name="gradient")
