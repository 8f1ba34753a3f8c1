"""plan(): a pure function whose answer a person can read."""

import dataclasses
import math

import pytest
import torch

from opsd_kernels import Plan, plan

TYPICAL = (8192, 4096, 151936)


def test_is_pure_frozen_and_hashable() -> None:
    first, second = plan(*TYPICAL), plan(*TYPICAL)
    assert isinstance(first, Plan) and first == second and hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.gemms = 1


@pytest.mark.parametrize("loss", ["divergence", "logprob"])
@pytest.mark.parametrize("tokens", [1, 255, 1024, 8192])
@pytest.mark.parametrize("workspace_mib", [None, 4, 64, 1024])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_blocks_cover_the_tokens_within_the_budget(
    backend: str, workspace_mib: int | None, tokens: int, loss: str
) -> None:
    budget = None if workspace_mib is None else workspace_mib << 20
    p = plan(tokens, 1024, 32768, loss=loss, workspace_bytes=budget, backend=backend)
    assert p.schedule == "blocked" and p.backend == backend
    assert 1 <= p.rows_per_block <= tokens
    assert p.num_blocks == math.ceil(tokens / p.rows_per_block)
    assert 0 < p.workspace_bytes <= (256 << 20 if budget is None else budget)
    # Both models' fp32 logits of a block, or one model's, are at least what a block holds.
    buffers = 2 if loss == "divergence" else 1
    assert p.workspace_bytes >= buffers * p.rows_per_block * 32768 * 4


def test_rows_that_cpp_does_not_look_at_again_need_no_logits() -> None:
    forward = {"grad_input": False, "backend": "cpp"}
    for loss in ({"loss": "logprob"}, {"two_passes": False}):
        p = plan(*TYPICAL, **loss, **forward)
        assert p.workspace_bytes == 0 and p.rows_per_block == 1024
    assert plan(*TYPICAL, **forward).workspace_bytes > 0
    assert plan(0, 8, 64, loss="logprob", **forward).rows_per_block == 1


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision: expected one of .*got 'half'"):
        plan(8, 16, 100, precision="half")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend"):
        plan(*TYPICAL, backend="cuda")


def test_a_larger_budget_never_means_smaller_blocks() -> None:
    rows = [plan(*TYPICAL, workspace_bytes=mib << 20).rows_per_block for mib in (16, 64, 512, 4096)]
    assert rows == sorted(rows) and rows[0] < rows[-1]


def test_rows_follow_the_budget_not_the_shape_of_the_head() -> None:
    """Rows from V/D alone give many tiny chunks; here D plays no part."""
    rows = {
        plan(8192, d, 32768, workspace_bytes=256 << 20).rows_per_block for d in (64, 1024, 8192)
    }
    assert len(rows) == 1
    assert rows.pop() >= 256


@pytest.mark.parametrize(
    ("options", "gemms"),
    [
        ({"grad_input": False}, 2),
        ({"grad_input": False, "reduced": False}, 2),
        ({}, 3),
        ({"reduced": False}, 3),
        ({"grad_weight": True}, 4),
        ({"grad_weight": True, "reduced": False}, 6),
        ({"loss": "logprob", "grad_input": False}, 1),
        ({"loss": "logprob", "reduced": False}, 2),
        ({"loss": "logprob"}, 2),
        ({"loss": "logprob", "grad_weight": True}, 3),
        ({"loss": "logprob", "grad_weight": True, "reduced": False}, 4),
        ({"loss": "logprob", "entropy_grad": True, "reduced": False}, 3),
    ],
    ids=str,
)
def test_gemms(options: dict[str, object], gemms: int) -> None:
    p = plan(*TYPICAL, **options)
    assert p.gemms == gemms and isinstance(p.gemms, int)
    _, d, v = TYPICAL
    assert p.accumulator_bytes == (4 * d * v if options.get("grad_weight") else 0)


@pytest.mark.parametrize(
    "options", [{}, {"grad_weight": True}, {"loss": "logprob", "dtype": torch.bfloat16}]
)
def test_reads_as_a_sentence(options: dict[str, object]) -> None:
    p = plan(1024, 1024, 32768, **options)
    text = str(p)
    for part in (p.schedule, str(p.rows_per_block), str(p.gemms), "GEMM", "MiB"):
        assert part in text, (part, text)
    assert "Plan(" not in text and "\n" not in text and " " in text
    assert p.reason and isinstance(p.reason, str)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hinge"}, ["loss", "hinge", "divergence", "logprob"]),
        ({"schedule": "fast"}, ["schedule", "fast", "blocked"]),
        ({"workspace_bytes": 0}, ["workspace_bytes", "0"]),
        ({"workspace_bytes": -5}, ["workspace_bytes", "-5"]),
    ],
    ids=str,
)
def test_errors(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        plan(*TYPICAL, **options)
    for word in words:
        assert word in str(caught.value)


# --------------------------------------------------------------------------------------- on a GPU


def on_gpu(**options: object) -> Plan:
    return plan(*TYPICAL, **{"device": "cuda", "dtype": torch.bfloat16, **options})


def test_the_workspace_decides_the_schedule() -> None:
    chosen = on_gpu()
    assert chosen.schedule == "blocked" and chosen.rows_per_block == 384
    assert chosen.workspace_bytes <= 512 << 20
    little = on_gpu(workspace_bytes=200 << 20)
    assert little.schedule == "streaming" and little.gemms == 7
    assert "200 MiB holds the logits of 165 rows" in str(little)
    assert on_gpu(workspace_bytes=200 << 20, schedule="blocked").schedule == "blocked"
    # Few tokens: all of them fit where 256 rows would not.
    few = plan(100, *TYPICAL[1:], device="cuda", workspace_bytes=200 << 20)
    assert few.schedule == "blocked" and few.num_blocks == 1


def test_the_hidden_size_does_not_decide_it() -> None:
    for hidden in (64, 1024, 8192):
        p = plan(8192, hidden, 151936, dtype=torch.bfloat16, device="cuda")
        assert p.schedule == "blocked" and p.rows_per_block == 384


@pytest.mark.parametrize("mib", [1, 16, 64, 512])
@pytest.mark.parametrize("trained", [False, True])
def test_streaming_fits_any_workspace(trained: bool, mib: int) -> None:
    p = on_gpu(schedule="streaming", grad_weight=trained, workspace_bytes=mib << 20)
    assert 0 < p.workspace_bytes <= mib << 20
    assert 1024 <= p.slice_columns <= 8192 and p.rows_per_block * p.num_blocks >= p.num_tokens


@pytest.mark.parametrize(
    ("options", "gemms"),
    [
        ({"grad_input": False}, 4),
        ({}, 7),
        ({"two_passes": False}, 5),
        ({"grad_weight": True}, 8),
        ({"grad_weight": True, "two_passes": False}, 6),
        ({"grad_weight": True, "reduced": False}, 12),
        ({"loss": "logprob", "grad_input": False}, 1),
        ({"loss": "logprob"}, 3),
        ({"loss": "logprob", "grad_weight": True}, 4),
        ({"loss": "logprob", "entropy_grad": True, "reduced": False}, 4),
    ],
    ids=str,
)
def test_products_of_streaming(options: dict[str, object], gemms: int) -> None:
    assert on_gpu(schedule="streaming", **options).gemms == gemms


@pytest.mark.parametrize("where", [{"device": "cpu"}, {"dtype": torch.float64}], ids=str)
def test_streaming_needs_a_gpu(where: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="schedule: 'streaming' needs a CUDA device"):
        on_gpu(schedule="streaming", **where)


def test_too_small_for_one_row() -> None:
    for schedule in ("blocked", "streaming"):
        with pytest.raises(ValueError, match="workspace_bytes: 1000 is too small"):
            on_gpu(schedule=schedule, workspace_bytes=1000)
