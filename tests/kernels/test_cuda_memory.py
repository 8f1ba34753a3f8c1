"""Memory of a call on a CUDA device, and sizes beyond 2**31 logits."""

import argparse

import pytest
import torch

from opsd_kernels import plan, reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import assert_close, cast, make_pair, random_upstream
from tests.helpers import memory_probe
from tests.helpers.kernel_cases import STUDENT, move, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
MIB = 1 << 20
SLACK = 32 * MIB


def extra_peak(
    op: str, wrt: str, reduction: str, dtype: str, sizes: tuple[int, int, int]
) -> tuple[int, int]:
    """(bytes beyond the inputs at the peak of one call and its backward, bytes of gradients)."""
    args = argparse.Namespace(op=op, wrt=wrt, reduction=reduction, dtype=dtype, workspace_mib=64)
    with DEVICE:
        # cuBLAS takes its workspace from PyTorch's allocator at its first product.
        memory_probe.call(args, memory_probe.inputs(args, 32, 32, 64))
        tensors = memory_probe.inputs(args, *sizes)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        memory_probe.call(args, tensors)
    grads = [x.grad for x in tensors.values() if x.grad is not None]
    outputs = sum(x.numel() * x.element_size() for x in grads)
    return torch.cuda.max_memory_allocated() - before, outputs


# A trained head's fp32 accumulator is no output; at a hidden size of 64 it fits into the slack.
FROZEN_SIZES, TRAINED_SIZES = (4096, 512, 65536), (4096, 64, 65536)


@pytest.mark.parametrize(
    "call",
    [
        "jsd nothing mean bfloat16",
        "jsd input none bfloat16",
        "jsd input mean float32",
        "shared input mean bfloat16",
        "logprob input none bfloat16",
        "jsd head mean bfloat16",
        "jsd head none bfloat16",
        "cross_entropy head mean bfloat16",
        "topk nothing none bfloat16",
        "targets input none bfloat16",
        "targets head none bfloat16",
    ],
)
def test_peak_memory(call: str) -> None:
    extra, outputs = extra_peak(*call.split(), TRAINED_SIZES if "head" in call else FROZEN_SIZES)
    limit = 64 * MIB + outputs + SLACK
    assert extra <= limit, f"{extra / MIB:.1f} MiB, allowed {limit / MIB:.1f}"


def test_the_measurement_sees_full_logits() -> None:
    extra, outputs = extra_peak("reference", "input", "mean", "bfloat16", FROZEN_SIZES)
    assert extra > 4 * (64 * MIB + outputs + SLACK)


def check_some_rows(sizes: tuple[int, int, int], rows: list[int], workspace: int) -> None:
    """Per-token values, and gradients of an upstream that is zero but for some rows."""
    tokens, hidden, vocab = sizes
    pair = cast(make_pair(tokens, hidden, vocab, seed=13), torch.bfloat16)
    few = {k: v[rows] if k.endswith(("input", "labels")) else v for k, v in pair.items()}
    upstream = torch.zeros(tokens)
    upstream[rows] = 1 + random_upstream((len(rows),)).float().abs()
    options = {"beta": 0.5, "reduction": "none"}
    sized = {**options, "workspace_bytes": workspace}
    there = [upstream.to(DEVICE)]
    values, grads = run(fused_linear_jsd, move(pair, DEVICE), STUDENT, there, **sized)
    truth, upstream = reference.linear_jsd, [upstream[rows]]
    true, true_grads = run(truth, cast(few, torch.float64), STUDENT, upstream, **options)
    plain, plain_grads = run(truth, move(few, DEVICE), STUDENT, upstream, **options)
    elsewhere = torch.ones(tokens, dtype=torch.bool)
    elsewhere[rows] = False
    dh = grads["student_input"].cpu()
    assert (dh[elsewhere] == 0).all() and values[0].isfinite().all()
    assert_close(values[0][rows].cpu(), true[0], plain[0].cpu(), name="values")
    found, plain_grads = {**move(grads, "cpu"), "student_input": dh[rows]}, move(plain_grads, "cpu")
    for x in STUDENT:
        rule = {"factor": 1.2, "max_factor": 2.0, "name": x}
        assert_close(found[x], true_grads[x], plain_grads[x], **rule)


@pytest.mark.slow
def test_more_than_two_to_the_31_logits() -> None:
    """All rows in one block: 32-bit offsets would wrap in the logits of the last rows."""
    tokens, vocab = 16384, 151936
    room = 21 << 30
    if torch.cuda.mem_get_info()[0] < 2 * room:
        pytest.skip("needs 42 GiB of free device memory")
    options = {"dtype": torch.bfloat16, "grad_weight": True, "workspace_bytes": room}
    assert plan(tokens, 64, vocab, device=DEVICE, **options).rows_per_block == tokens
    edge = 2**31 // vocab
    check_some_rows((tokens, 64, vocab), [0, 1, edge - 1, edge, edge + 1, tokens - 1], room)
