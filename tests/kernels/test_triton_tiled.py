"""The schedule `tiled`, its products, and what a call holds at its peak beside the plan."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsd_kernels import layouts, plan, reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import cast, make_pair
from tests.helpers.gemm_counter import GEMM, HEAD, gemms
from tests.helpers.kernel_cases import STUDENT, move, run, same_bits
from tests.helpers.triton_cases import DTYPES, KINDS, TRAINED, compare

TILED = {"schedule": "tiled"}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 128 columns: several in a small vocabulary, and the last one narrower."""
    monkeypatch.setattr(layouts, "_SLICES", (128,))
    monkeypatch.setattr(layouts, "_WAVES", ())


@TRAINED
@DTYPES
@pytest.mark.parametrize("name", KINDS)
def test_accuracy(
    name: str, dtype: torch.dtype, trained: bool, triton_device: str, narrow: None
) -> None:
    pair = make_pair(11, 16, 301, masked=2, seed=1)
    compare(name, pair, trained, None, dtype, triton_device, **TILED, workspace_bytes=40_000)


@TRAINED
@pytest.mark.parametrize("masked", [0, 3])
@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_two_sizes(
    name: str,
    masked: int,
    trained: bool,
    triton_device: str,
    narrow: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later blocks repeat an earlier one's launches, unless they have fewer rows.

    301 columns are padded to 320, so one slice of three ends in columns of -inf.
    """
    from opsd_kernels.backends import triton_backend

    made, whole = [], triton_backend.LogitSlice

    def watched(heads: list, columns: slice, *rest: object) -> object:
        part = whole(heads, columns, *rest)
        made.append((columns.start, part.logits.shape[1]))
        return part

    monkeypatch.setattr(triton_backend, "LogitSlice", watched)
    pair = make_pair(19 + masked, 16, 301, masked=masked, seed=5)
    how = {**TILED, "workspace_bytes": 8_000}
    compare(name, pair, trained, None, torch.float32, triton_device, **how)
    ours = [x for x in made if x[0] == 0]
    sizes = {rows for _, rows in ours}
    assert len(sizes) == 2, sizes
    assert set(made) == {(first, rows) for first in (0, 128, 256) for rows in sizes}


@pytest.mark.parametrize("shared", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize("kind", ["random", "close"])
def test_sure_rows_keep_their_small_gradient(
    kind: str, shared: bool, triton_device: str, narrow: None
) -> None:
    """Where the student is sure, K - log(m / s) cancels: s and its share are rounded apart, but
    about the row's mean. The yardstick is `blocked`, which rounds dz itself."""
    pair = cast(make_pair(8, 16, 301, kind=kind, std=6.0, seed=2), torch.float16)
    if shared:
        pair["teacher_weight"] = pair["student_weight"]
    how = {"beta": 0.5, "temperature": 0.5, "reduction": "none"}
    upstream = [torch.ones(8)]
    _, true = run(reference.linear_jsd, cast(pair, torch.float64), STUDENT[:1], upstream, **how)
    there, ones = move(pair, triton_device), [upstream[0].to(triton_device)]
    rows = {}
    for schedule in ("tiled", "blocked"):
        _, grads = run(fused_linear_jsd, there, STUDENT[:1], ones, **how, schedule=schedule)
        gap = (grads["student_input"].cpu().double() - true["student_input"]).norm(dim=-1)
        rows[schedule] = gap / true["student_input"].norm(dim=-1)
    assert (rows["tiled"] <= 3 * rows["blocked"] + 1e-3).all(), rows


def test_two_runs_give_the_same_bits(triton_device: str, narrow: None) -> None:
    pair = move(make_pair(11, 16, 301, masked=2, dtype=torch.float32, seed=3), triton_device)
    first = run(fused_linear_jsd, pair, STUDENT, **TILED)
    dirt = [torch.full((n, 301), torch.nan, device=triton_device) for n in (1, 7, 20)]
    del dirt
    same_bits(first, run(fused_linear_jsd, pair, STUDENT, **TILED))


@pytest.mark.parametrize(
    ("beta", "clip", "wrt", "reduction", "expected"),
    [
        (0.5, None, HEAD[:1], "none", 6),
        (0.0, None, HEAD[:1], "mean", 5),
        (0.5, 0.1, HEAD[:1], "mean", 7),
        (0.5, None, HEAD, "mean", 8),
        (1.0, None, HEAD, "mean", 6),
        (0.5, None, (), "mean", 4),
    ],
)
def test_products(
    beta: float, clip: float | None, wrt: tuple, reduction: str, expected: int,
    triton_device: str, narrow: None,
) -> None:  # fmt: skip
    sizes = 6, 16, 300
    pair = move(make_pair(*sizes, dtype=torch.float32), triton_device)
    options = {**TILED, "beta": beta, "reduction": reduction, "token_clip": clip}
    found = GEMM * gemms(lambda: run(fused_linear_jsd, pair, wrt, **options))
    assert found == pytest.approx(expected * 2 * math.prod(sizes))
    promised = plan(
        *sizes, device="cuda", **TILED, grad_input="student_input" in wrt,
        grad_weight="student_weight" in wrt, two_passes=beta == 0.5 or clip is not None,
        clipped=clip is not None,
    )  # fmt: skip
    assert promised.gemms == expected


# ------------------------------------------------------------------------------------------ memory


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages that operators made and that lived at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {k: v for k, v in self.made.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return out


@pytest.fixture
def live(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Sees what the backend allocates inside the registered operators."""
    from opsd_kernels.backends import triton_backend, triton_launch

    if triton_device == "cpu":  # a hidden size of 4096 in few steps of a product
        steps = triton_launch.Blocks(16, 64, 1024, 1, 1, 2)
        monkeypatch.setattr(triton_launch, "blocks", lambda **_: steps)
    seen, whole = LiveBytes(), triton_backend.divergence

    def watched(*args: object) -> object:
        with seen:
            return whole(*args)

    monkeypatch.setattr(triton_backend, "divergence", watched)
    yield seen


@pytest.mark.parametrize(
    "shared", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["distinct", "shared"]
)
@pytest.mark.parametrize("schedule", ["blocked", "tiled", "streaming"])
def test_what_labels_gather_is_in_the_plan(
    schedule: str, shared: bool, live: LiveBytes, triton_device: str, narrow: None
) -> None:
    """At a hidden size of 4096 the gathered rows of both models outweigh all else."""
    tokens, hidden, vocab = 20, 4096, 130
    pair = move(make_pair(tokens, hidden, vocab, masked=3, dtype=torch.float16), triton_device)
    if shared:
        pair["teacher_weight"] = pair["student_weight"]
    budget = 10 * 2 * 4096 * 6 + 10 * 4 * 2 * 400
    how = {"schedule": schedule, "workspace_bytes": budget, "precision": "fp32"}
    run(fused_linear_jsd, pair, STUDENT[:1], **how)
    promised = plan(tokens, hidden, vocab, device="cuda", dtype=torch.float16, **how)
    assert promised.num_blocks > 1
    gathered = promised.rows_per_block * hidden * 2 * 2
    grad = tokens * hidden * 4  # of float16 in fp32, until backward scales it
    # Per-token statistics, and what a product in the interpreter casts to fp32.
    slack = tokens * 64 * 4 + (vocab + 2 * promised.rows_per_block) * hidden * 4
    assert promised.workspace_bytes <= budget
    assert live.peak >= gathered + grad
    assert live.peak <= promised.workspace_bytes + grad + slack
