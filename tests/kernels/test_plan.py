"""plan(): a pure function whose answer a person can read."""

import dataclasses
import itertools
import math

import pytest
import torch

from opsd_kernels import Plan, extension, plan
from opsd_kernels.layouts import even_blocks, padded_columns
from opsd_kernels.plan import SCHEDULES

TYPICAL = (8192, 4096, 151936)


def test_is_pure_frozen_and_hashable() -> None:
    first, second = plan(*TYPICAL), plan(*TYPICAL)
    assert isinstance(first, Plan) and first == second and hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.gemms = 1


# Budgets below and above what one block needs; token counts below, off and on block sizes.
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
    chosen = on_gpu(precision="fp32")
    assert chosen.schedule == "blocked" and chosen.rows_per_block == 384
    assert chosen.workspace_bytes <= 512 << 20
    little = on_gpu(workspace_bytes=64 << 20)
    assert little.schedule == "tiled" and little.gemms == 6
    assert little.workspace_bytes <= 64 << 20
    assert on_gpu(workspace_bytes=64 << 20, two_passes=False).gemms == 5
    assert "64 MiB holds" in str(little)
    assert on_gpu(workspace_bytes=32 << 20).schedule == "streaming"
    for name in ("blocked", "tiled", "streaming"):
        assert on_gpu(workspace_bytes=64 << 20, schedule=name).schedule == name
    # Few tokens: all of them fit where 256 rows would not.
    few = plan(100, *TYPICAL[1:], device="cuda", workspace_bytes=200 << 20)
    assert few.schedule == "blocked" and few.num_blocks == 1


def test_a_clip_takes_tiled_one_pass_more() -> None:
    """Its gradient cannot be made beside the sums that it needs."""
    small = {"workspace_bytes": 64 << 20, "schedule": "tiled"}
    assert on_gpu(**small, clipped=True).gemms == 7


@pytest.mark.parametrize("tokens", [1024, 8192, 32768])
def test_a_trained_head_has_rows_that_pay_for_its_accumulator(tokens: int) -> None:
    """At 790 TFLOP/s and 3.0 TB/s, 2 M D V operations outlast 8 D V bytes from 1,053 rows on."""
    p = plan(tokens, 4096, 151936, device="cuda", dtype=torch.bfloat16, grad_weight=True)
    assert p.rows_per_block >= min(tokens, 1024)
    assert p.workspace_bytes <= p.accumulator_bytes
    mine = on_gpu(grad_weight=True, workspace_bytes=512 << 20)
    assert mine.workspace_bytes <= 512 << 20


@pytest.mark.parametrize(
    ("options", "one_block"),
    [
        ({}, True),
        ({"loss": "divergence", "num_tokens": 512}, True),
        ({"loss": "divergence", "num_tokens": 513}, False),
        ({"num_tokens": 1025}, False),
        ({"reduced": True}, False),
        ({"grad_weight": False, "grad_bias": True}, False),
        ({"dtype": torch.float32}, False),
        ({"workspace_bytes": 256 << 20}, False),
    ],
    ids=str,
)
def test_cpp_keeps_all_logits_for_backward_in_the_bytes_of_an_fp32_sum(
    options: dict[str, object], one_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where a single block needs no such sum; without bf16 products it does."""
    shape = {"num_tokens": 1024, "hidden_size": 1024, "vocab_size": 151936}
    unreduced = {"loss": "logprob", "dtype": torch.bfloat16, "grad_weight": True, "reduced": False}
    asked = shape | unreduced | {"backend": "cpp"} | options
    monkeypatch.setattr(extension, "multiplies_bf16", lambda: True)
    chosen = plan(**asked)
    assert (chosen.num_blocks == 1) == one_block
    if one_block:
        assert chosen.gemms == 2 + (2 if chosen.loss == "divergence" else 1)
    assert chosen.workspace_bytes <= (4 * 1024 * 151936 if one_block else 256 << 20)
    monkeypatch.setattr(extension, "multiplies_bf16", lambda: False)
    assert plan(**asked).num_blocks > 1


@pytest.mark.parametrize(
    ("rows", "limit", "sizes"),
    [
        (8192, 384, [384] * 20 + [256] * 2),
        (8192, 768, [768] * 10 + [512]),
        (8192, 1536, [1536] + [1344] * 4 + [1280]),
        (1000, 384, [384, 384, 232]),
        (500, 384, [256, 244]),
        (10, 4, [4, 3, 3]),
        (3, 128, [3]),
        (0, 128, []),
    ],
)
def test_blocks_are_even(rows: int, limit: int, sizes: list[int]) -> None:
    assert even_blocks(rows, limit) == sizes and sum(sizes) == rows


def test_no_block_has_more_rows_than_fit() -> None:
    for limit, rows in itertools.product((1, 3, 100, 128, 192, 384, 576, 768), range(0, 1600, 3)):
        sizes = even_blocks(rows, limit)
        assert sum(sizes) == rows and sizes == sorted(sizes, reverse=True)
        assert all(0 < size <= limit for size in sizes), (rows, limit, sizes)


def test_the_hidden_size_hardly_decides_it() -> None:
    for hidden in (1024, 2048, 4096):
        p = plan(8192, hidden, 151936, dtype=torch.bfloat16, device="cuda", precision="fp32")
        assert p.schedule == "blocked" and p.rows_per_block == 384


@pytest.mark.parametrize("vocab", [151936, 50257, 131])
def test_rows_of_logits_start_on_whole_vectors(vocab: int) -> None:
    assert padded_columns(vocab) % 64 == 0 and 0 <= padded_columns(vocab) - vocab < 64


@pytest.mark.parametrize("schedule", ["blocked", "tiled", "streaming"])
def test_gathered_hidden_states_are_counted(schedule: str) -> None:
    """Labels leave rows out of both models' hidden states: the others are gathered."""
    how = {"dtype": torch.bfloat16, "device": "cuda", "schedule": schedule, "precision": "fp32"}
    how |= {"workspace_bytes": 64 << 20}
    large, small = plan(*TYPICAL, **how), plan(8192, 1, 151936, **how)
    assert large.workspace_bytes <= 64 << 20
    assert large.workspace_bytes / large.rows_per_block >= 2 * 2 * 4096
    assert large.rows_per_block < small.rows_per_block


# From less than one slice of the vocabulary to more than all of it.
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


# Two reasons why a schedule cannot run.
@pytest.mark.parametrize("schedule", ["tiled", "streaming"])
@pytest.mark.parametrize("where", [{"device": "cpu"}, {"dtype": torch.float64}], ids=str)
def test_some_schedules_need_a_gpu(where: dict[str, object], schedule: str) -> None:
    with pytest.raises(ValueError, match=f"schedule: '{schedule}' needs a CUDA device"):
        on_gpu(schedule=schedule, **where)


def test_too_small_for_one_row() -> None:
    for schedule in SCHEDULES:
        with pytest.raises(ValueError, match="workspace_bytes: 1000 is too small"):
            on_gpu(schedule=schedule, workspace_bytes=1000)
