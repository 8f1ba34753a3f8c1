"""How the Triton backend works: block sizes, bits, memory, products, compilations."""

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels import plan
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair
from tests.helpers.compiled import equal_bits
from tests.helpers.gemm_counter import GEMM, HEAD, gemms
from tests.helpers.kernel_cases import STUDENT, move, prepare, run, same_bits
from tests.helpers.triton_cases import KINDS, SCHEDULES, TRAINED, compare, policy_gradient

INTERPRETED = not torch.cuda.is_available()
# A pair that passes twice, and one head; the others run with the exhaustive tests.
SOME_KINDS = [
    name
    if name in ("jsd 0.1", "cross-entropy")
    else pytest.param(name, marks=pytest.mark.exhaustive)
    for name in KINDS
]
# Rows, columns, inner size, parts: a row at a time, tiles wider than the vocabulary, all parts.
TILES = [(16, 32, 16, 1), (16, 128, 32, 4), (32, 64, 64, 2), (64, 256, 16, 8)]


def ours(name: str, schedule: str, trained: bool, pair: dict[str, Tensor]) -> tuple:
    """The loss, its inputs, the names to differentiate and its options, on a schedule."""
    loss, inputs, wrt, options = prepare(name, pair, trained, None)
    if name == "policy gradient":
        return policy_gradient(schedule=schedule), inputs, wrt, options
    return loss.fn, inputs, wrt, {**options, "schedule": schedule}


# Every tile shape through pointers and descriptors; losses with one head and two, one pass and two.
@pytest.mark.skipif(not INTERPRETED, reason="sizes of the interpreter")
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", ["jsd 0", "jsd 0.1", "logprob and entropy"])
def test_block_sizes_do_not_change_the_result(
    name: str, tile: tuple, use_tma: bool, triton_device: str, monkeypatch
) -> None:
    from opsd_kernels.backends import triton_launch

    sizes = triton_launch.Blocks(*tile[:3], 1, 1, tile[3])
    monkeypatch.setattr(triton_launch, "blocks", lambda **_: sizes)
    monkeypatch.setattr(triton_launch, "can_use_tma", lambda *_: use_tma)
    pair = make_pair(33, 24, 201, masked=3, seed=21)
    compare(name, pair, True, None, torch.float32, triton_device, schedule="streaming")


# By default test_buffers and test_triton_proof show the same, with memory that holds NaN.
@pytest.mark.exhaustive
@SCHEDULES
@TRAINED
@pytest.mark.parametrize("name", KINDS)
def test_two_runs_give_the_same_bits(
    name: str, trained: bool, schedule: str, triton_device: str
) -> None:
    pair = move(make_pair(20, 24, 201, masked=3, dtype=torch.float32, seed=22), triton_device)
    fn, inputs, wrt, options = ours(name, schedule, trained, pair)
    first = run(fn, inputs, wrt, **options)
    dirt = [torch.full((n, 201), torch.nan, device=triton_device) for n in (1, 7, 20)]
    del dirt
    same_bits(first, run(fn, inputs, wrt, **options))


@pytest.mark.parametrize("vocab", [257, 200])
def test_rows_of_logits_start_on_whole_vectors(
    vocab: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any vocabulary, cut ones too: 128-bit loads, and cuBLAS' fast products, need it."""
    from opsd_kernels.backends import triton_rows_launch

    seen, whole = [], triton_rows_launch.StoredTiles.__init__

    def watched(self, logits: Tensor, *rest: object) -> None:
        seen.append(logits)
        assert logits[..., vocab:].isneginf().all()
        whole(self, logits, *rest)

    monkeypatch.setattr(triton_rows_launch.StoredTiles, "__init__", watched)
    pair = move(make_pair(11, 8, 257, masked=2, dtype=torch.float16, seed=25), triton_device)
    pair["shift_labels"].clamp_(max=vocab - 1)
    run(fused_linear_jsd, pair, STUDENT[:1], schedule="blocked", vocab_size=vocab)
    (logits,) = seen
    assert logits.shape == (2, 9, -(-vocab // 64) * 64)
    for model in logits:  # the teacher's rows too
        assert model.storage_offset() % 64 == 0 and model.stride(0) % 64 == 0


# ------------------------------------------------------------------------------------------ memory


class Allocations(TorchDispatchMode):
    """The largest storage that any operator, also inside the registered ones, returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.fixture
def inside(monkeypatch) -> Iterator[Allocations]:
    """Sees allocations inside the registered operators too, which dispatch modes do not enter."""
    from opsd_kernels.backends import triton_backend

    seen = Allocations()

    def watched(whole: Callable, *args: object) -> object:
        with seen:
            return whole(*args)

    for name in ("divergence", "logprob"):
        whole = getattr(triton_backend, name)
        monkeypatch.setattr(triton_backend, name, functools.partial(watched, whole))
    yield seen


@TRAINED
@pytest.mark.parametrize("name", SOME_KINDS)
@pytest.mark.usefixtures("wide_tiles")
def test_streaming_never_holds_the_logits(
    name: str, trained: bool, triton_device: str, request: pytest.FixtureRequest
) -> None:
    inside = request.getfixturevalue("inside")  # after the device's fixture
    tokens, hidden, vocab = 24, 4, 2100
    pair = move(make_pair(tokens, hidden, vocab, dtype=torch.float32, seed=23), triton_device)
    fn, inputs, wrt, options = ours(name, "streaming", trained, pair)
    slice_of_10_rows = 10 * 2 * 4 * (1024 + hidden)
    run(fn, inputs, wrt, **options, workspace_bytes=slice_of_10_rows)
    # Half of one model's logits; the head's own gradient is smaller here.
    assert 0 < inside.largest <= tokens * vocab * 4 // 2


@pytest.mark.parametrize(
    ("schedule", "beta", "wrt", "reduction", "expected"),
    [
        ("blocked", 0.5, HEAD[:1], "none", 3),
        ("blocked", 1.0, HEAD, "none", 6),
        ("streaming", 0.5, HEAD[:1], "none", 7),
        ("streaming", 1.0, HEAD, "mean", 6),
    ],
)
def test_products(
    schedule: str,
    beta: float,
    wrt: tuple[str, ...],
    reduction: str,
    expected: int,
    triton_device: str,
) -> None:
    """The plan's promise; of `streaming` cuBLAS sees the gradients' products only."""
    sizes = 6, 16, 300
    pair = move(make_pair(*sizes, dtype=torch.float32), triton_device)
    options = {"schedule": schedule, "beta": beta, "reduction": reduction, "return_stats": True}
    found = GEMM * gemms(lambda: run(fused_linear_jsd, pair, wrt, **options))
    outside = len(wrt) if schedule == "streaming" else expected
    assert found == pytest.approx(outside * 2 * math.prod(sizes))
    promised = plan(
        *sizes, device="cuda", schedule=schedule, grad_input="student_input" in wrt,
        grad_weight="student_weight" in wrt, reduced=reduction != "none", two_passes=beta == 0.5,
    )  # fmt: skip
    assert promised.gemms == expected


# ------------------------------------------------------------------------------------ compilations


@SCHEDULES
@TRAINED
@pytest.mark.parametrize("name", ["jsd", "cross-entropy"])
def test_compiled_equals_eager(name: str, trained: bool, schedule: str, triton_device: str) -> None:
    def fn(**p: Tensor) -> object:
        if name == "cross-entropy":
            student = p["student_input"], p["student_weight"], p["shift_labels"]
            return fused_linear_cross_entropy(*student, bias=p["student_bias"], schedule=schedule)
        return fused_linear_jsd(**p, schedule=schedule)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    pair = move(make_pair(20, 12, 70, masked=3, dtype=torch.float32, seed=24), triton_device)
    equal_bits(fn, compiled, pair, STUDENT if trained else STUDENT[:1])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing; see test_triton_compile")
@SCHEDULES
def test_no_compilation_when_numbers_change(schedule: str, triton_device: str) -> None:
    import triton

    made = []
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = lambda **event: made.append(event["repr"])
    try:
        for beta, temperature, tokens in ((0.5, 1.0, 300), (0.3, 0.7, 300), (0.9, 2.0, 171)):
            pair = move(make_pair(tokens, 64, 1111, dtype=torch.bfloat16), triton_device)
            how = {"beta": beta, "temperature": temperature, "schedule": schedule}
            run(fused_linear_jsd, pair, STUDENT, **how)
            if beta == 0.5:
                first = len(made)
        assert first and len(made) == first, made[first:]
    finally:
        triton.knobs.runtime.jit_cache_hook = before
