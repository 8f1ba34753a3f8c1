"""Logits that the forward pass of a trained head leaves to its backward (ops/kept.py)."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from opsd_kernels import extension
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.ops import kept
from opsd_kernels.problem import GradsNeeded
from opsd_kernels.testing import make_pair

pytestmark = pytest.mark.skipif(not extension.loaded(), reason="the C++ operators are not built")
N, D, V = 48, 96, 300  # the logits of two heads take as many bytes as the head in fp32


def divergence(pair: dict[str, Tensor], **options: object) -> Tensor:
    tensors = [pair[f"{m}_{x}"] for m in ("student", "teacher") for x in ("input", "weight")]
    return fused_linear_jsd(*tensors, pair["labels"], reduction="none", **options)


def logprob(pair: dict[str, Tensor], **options: object) -> Tensor:
    value, entropy = fused_linear_logprob(
        pair["student_input"],
        pair["student_weight"],
        pair["labels"],
        return_entropy=True,
        **options,
    )
    return value + 0.3 * entropy


def targets(pair: dict[str, Tensor], **options: object) -> Tensor:
    several = torch.stack([pair["labels"], (pair["labels"] + V // 2) % V], 1)
    several[pair["labels"] == -100] = -100
    value, lse = fused_linear_logprob(
        pair["student_input"], pair["student_weight"], several, return_lse=True, **options
    )
    return value[:, 0] + 0.4 * value[:, 1] + 0.3 * lse


LOSSES: dict[str, Callable[..., Tensor]] = {
    "log-probability and entropy": logprob,
    "several targets": targets,
    "JSD": divergence,
    "forward KL": lambda pair, **how: divergence(pair, beta=0.0, **how),
    "reverse KL, clipped": lambda pair, **how: divergence(pair, beta=1.0, token_clip=0.05, **how),
}


def problem(dtype: torch.dtype, ignored: int = 0) -> dict[str, Tensor]:
    pair = make_pair(N, D, V, dtype=dtype, seed=3)
    pair["labels"] = torch.arange(N) % V
    pair["labels"][:ignored] = -100
    for name in ("student_input", "student_weight"):
        pair[name].requires_grad_()
    return pair


def gradients(
    loss: Callable[..., Tensor], pair: dict[str, Tensor], **options: object
) -> tuple[list[Tensor], int]:
    """Gradients of a weighted sum, and how many blocks were multiplied for it."""
    leaves = [pair["student_input"], pair["student_weight"]]
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        value = loss(pair, **options)
        found = torch.autograd.grad(value, leaves, torch.linspace(0.5, 2, N))
    counts = {event.key: event.count for event in trace.key_averages()}
    return list(found), counts["opsd_cpu::statistics"]


# A block each, three, and blocks of which some rows are ignored.
@pytest.mark.parametrize(("blocks", "ignored"), [(1, 0), (3, 0), (1, 7), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_as_without(
    name: str, dtype: torch.dtype, blocks: int, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward multiplies one block less, and makes the gradients it would have made."""
    heads = 1 if LOSSES[name] in (logprob, targets) else 2
    options = {"workspace_bytes": heads * V * 4 * -(-N // blocks)}
    pair = problem(dtype, ignored)
    ours, multiplied = gradients(LOSSES[name], pair, **options)
    monkeypatch.setattr(kept, "wanted", lambda group: None)
    again, without = gradients(LOSSES[name], pair, **options)
    # Without, a forward pass that stores no logits may take all rows at once.
    assert multiplied == 2 * blocks - 1 and without in (2 * blocks, 1 + blocks)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(ours, again, strict=True))


@pytest.mark.skipif(not extension.multiplies_bf16(), reason="a block adds to fp32 sums")
@pytest.mark.parametrize("ignored", [0, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_all_logits_of_a_bfloat16_head(
    name: str, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the default workspace is a third of them: backward has the one block of forward."""
    heads = 1 if LOSSES[name] in (logprob, targets) else 2
    pair = problem(torch.bfloat16, ignored)
    true, _ = gradients(LOSSES[name], pair, workspace_bytes=heads * V * 4 * N)
    third = heads * V * 4 * N // 3
    monkeypatch.setattr(sys.modules["opsd_kernels.plan"], "default_workspace", lambda _: third)
    ours, multiplied = gradients(LOSSES[name], pair)
    assert multiplied == 1
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(ours, true, strict=True))


def test_one_block_in_a_process() -> None:
    """Of several losses that wait for their backward only one holds logits."""
    pair = problem(torch.float32)
    first, second = logprob(pair), logprob(pair)
    assert kept._alive() is not None
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        (first + second).sum().backward()
    counts = {event.key: event.count for event in trace.key_averages()}
    assert counts["opsd_cpu::statistics"] == 1 and kept._alive() is None


def test_backward_again_and_rows_without_upstream() -> None:
    """What is kept serves one backward, and none that computes other rows."""
    pair = problem(torch.float32, ignored=5)
    leaves = [pair["student_input"], pair["student_weight"]]
    value = logprob(pair)
    first = torch.autograd.grad(value, leaves, torch.ones(N), retain_graph=True)
    again = torch.autograd.grad(value, leaves, torch.ones(N))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    upstream = torch.ones(N)
    upstream[20:] = 0
    some = torch.autograd.grad(logprob(pair), leaves, upstream)
    alone = dict(pair, labels=pair["labels"].where(upstream > 0, -100))
    true = torch.autograd.grad(logprob(alone), leaves, torch.ones(N))
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(some, true, strict=True))


def test_nothing_is_kept_with_a_process_group() -> None:
    """Ranks multiply the same blocks together, whatever waits for its backward on one of them."""
    needed = GradsNeeded(hidden=True, weight=True)
    with kept.keeping(needed):
        assert kept.wanted(None) is needed and kept.wanted("0") is None


def test_head_alone() -> None:
    """Hidden states without a gradient: the head's backward goes on from what is kept too."""
    pair = problem(torch.float32)
    both, _ = gradients(logprob, pair)
    pair["student_input"] = pair["student_input"].detach()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        value = logprob(pair)
        (alone,) = torch.autograd.grad(value, [pair["student_weight"]], torch.linspace(0.5, 2, N))
    counts = {event.key: event.count for event in trace.key_averages()}
    assert counts["opsd_cpu::statistics"] == 1 and torch.equal(alone, both[1])
