"""fused_linear_topk on a CPU's backends, against a stable sort of full logits in float64."""

import pytest
import torch
from torch.library import opcheck

from opsd_kernels import plan, reference
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.testing import cast
from tests.helpers.compiled import Recorder
from tests.helpers.gemm_counter import D, N, V, gemms
from tests.helpers.kernel_cases import workspace_for
from tests.helpers.topk_cases import check, integer_case, random_case

pytestmark = pytest.mark.usefixtures("cpu_backend")

WIDTH = 301
# fp64 takes PyTorch's backend; 16-bit inputs take other products.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {"softcap": 6.0, "temperature": 0.7, "logit_scale": 0.5}


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# One, few, more than a vector, all: each fills a row's room in another way.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 64, WIDTH])
def test_values(k: int, dtype: torch.dtype) -> None:
    check(random_case(37, 19, WIDTH), k, dtype, **OPTIONS)
    check(random_case(37, 19, WIDTH, seed=1), k, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 64, WIDTH])
def test_ties_and_banned_entries(k: int, dtype: torch.dtype) -> None:
    """Nearly all logits have equals, and a quarter is -inf: the lower ids come first."""
    case = integer_case(23, 8, WIDTH)
    ours = fused_linear_topk(**cast(case, dtype), k=k)
    true = reference.linear_topk(**case, k=k)
    assert torch.equal(ours[1], true[1])
    assert torch.equal(ours[0].isneginf(), true[0].isneginf())
    assert ours[0].isneginf().any() == (k == WIDTH)
    check(case, k, dtype)


def test_equal_rows_of_the_head() -> None:
    case = random_case(9, 8, 200, seed=2)
    for name in ("weight", "bias"):
        case[name][[150, 77, 33]] = case[name][5].clone()
        case[name][100:] = case[name][:100].clone()
    for k in (1, 2, 50, 200):
        check(case, k, torch.float32)


def test_leading_shapes_strides_and_vocab_size() -> None:
    case = random_case(24, 10, 90, seed=3)
    case["shift_labels"].clamp_(max=79)
    flat = fused_linear_topk(**case, k=7, vocab_size=80)
    check({**case, "weight": case["weight"][:80], "bias": case["bias"][:80]}, 7, torch.float64)
    shaped = dict(case)
    shaped["input"] = case["input"].view(2, 3, 4, 10)
    shaped["shift_labels"] = case["shift_labels"].view(2, 3, 4)
    shaped["weight"] = case["weight"].t().contiguous().t()
    shaped["bias"] = case["bias"].repeat_interleave(2)[::2]
    for name, a, b in zip(
        "lis", fused_linear_topk(**shaped, k=7, vocab_size=80), flat, strict=True
    ):
        assert a.shape == (2, 3, 4, *b.shape[1:]) and a.is_contiguous()
        torch.testing.assert_close(a.flatten(0, 2), b, msg=name)
    assert (flat[1][case["shift_labels"] != -100] < 80).all()


def test_dropped_tokens_are_never_multiplied() -> None:
    case = random_case(24, 10, 90, seed=4)
    dropped = case["shift_labels"] == -100
    case["input"][dropped] = torch.nan
    case["shift_labels"][dropped] = 7
    kept = case["shift_labels"] != 7
    logprob, ids, lse = fused_linear_topk(**case, k=5, ignore_index=7)
    assert (logprob[~kept] == 0).all() and (ids[~kept] == 7).all() and (lse[~kept] == 0).all()
    check({**case, "input": case["input"].nan_to_num()}, 5, torch.float32, ignore_index=7)
    nothing = {**case, "shift_labels": torch.full_like(case["shift_labels"], -100)}
    logprob, ids, lse = fused_linear_topk(**nothing, k=5)
    assert not logprob.any() and (ids == -100).all() and not lse.any()


def test_an_empty_batch() -> None:
    empty = random_case(0, 10, 90)
    shapes = [tuple(x.shape) for x in fused_linear_topk(**empty, k=5)]
    assert shapes == [(0, 5), (0, 5), (0,)]


# 7 rows a block; 3,000 columns are several chunks of the C++ operator.
@pytest.mark.parametrize("k", [5, 2000])
def test_several_blocks_and_chunks(k: int) -> None:
    case = integer_case(40, 8, 3000, seed=5)
    budget = workspace_for(7, 40, 8, 3000, loss="topk", k=k)
    assert plan(40, 8, 3000, loss="topk", k=k, workspace_bytes=budget).num_blocks > 1
    check(case, k, torch.float32, only_ours={"workspace_bytes": budget})


def test_bits_depend_on_no_threads(threads: object) -> None:
    case = cast(random_case(70, 16, 5000, seed=6), torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(fused_linear_topk(**case, k=64))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("slope", [1.0, -1.0], ids=["rising", "falling"])
def test_every_column_is_the_largest_so_far(slope: float) -> None:
    case = {"input": torch.ones(3, 1), "weight": slope * torch.arange(2500.0)[:, None] / 64}
    check(case, 100, torch.float32)


def test_nan_and_infinity_leave_valid_ids() -> None:
    case = cast(random_case(6, 10, 900, seed=7), torch.float32)
    del case["shift_labels"]
    case["input"][2] = torch.nan
    case["input"][4, 0] = torch.inf
    logprob, ids, lse = fused_linear_topk(**case, k=90)
    assert lse.isfinite().tolist() == [True, True, False, True, False, True]
    assert logprob[2].isnan().all()
    assert all(len(set(row)) == 90 and 0 <= min(row) <= max(row) < 900 for row in ids.tolist())


def test_large_offsets_keep_their_digits() -> None:
    case = random_case(20, 10, 300, seed=8)
    case["bias"] += 1000
    check(case, 20, torch.float32)


def test_no_gradient_and_one_product() -> None:
    case = cast(random_case(20, 10, 300, seed=9), torch.float32)
    for name in ("input", "weight", "bias"):
        case[name].requires_grad_()
    assert not any(x.requires_grad for x in fused_linear_topk(**case, k=4))
    assert plan(N, D, V, loss="topk", k=4, grad_weight=True).gemms == 1


def test_products_are_counted(torch_backend: str) -> None:
    case = cast(random_case(N, D, V), torch.float32)
    labels = case.pop("shift_labels")
    assert gemms(lambda: fused_linear_topk(**case, k=8)) == pytest.approx(1)
    labels = labels.clamp(min=0)
    labels[N // 4 :] = -100
    dropped = gemms(lambda: fused_linear_topk(**case, k=8, shift_labels=labels))
    assert dropped == pytest.approx(1 / 4)


def test_compiled_equals_eager() -> None:
    case = cast(random_case(24, 12, 70), torch.float32)

    def run(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return fused_linear_topk(**tensors, k=6, softcap=9.0, temperature=0.5)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with Recorder() as recorder:
        eager = run(**case)
    assert all(torch.equal(a, b) for a, b in zip(compiled(**case), eager, strict=True))
    for operator, args, kwargs in recorder.calls:
        opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_autocast_is_respected() -> None:
    case = cast(random_case(20, 10, 300, seed=10), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fused_linear_topk(**case, k=4)
    half = {name: case[name].bfloat16() for name in ("input", "weight")}
    for a, b in zip(ours, fused_linear_topk(**{**case, **half}, k=4), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, ("k:", "0")),
        ({"k": -2}, ("k:", "-2")),
        ({"k": 12}, ("k:", "12", "11")),
        ({"k": 2.0}, ("k:", "2.0")),
        ({"k": True}, ("k:", "True")),
        ({"k": 11, "vocab_size": 10}, ("k:", "11", "10")),
        ({"vocab_size": 12}, ("vocab_size", "12")),
        ({"shift_labels": torch.zeros(4, dtype=torch.long)}, ("shift_labels", "4", "5")),
        ({"shift_labels": torch.full((5,), 11)}, ("shift_labels", "11")),
        ({"bias": torch.zeros(10)}, ("bias", "10", "11")),
        ({"temperature": 0.0}, ("temperature", "0")),
        ({"schedule": "streaming"}, ("schedule", "streaming", "blocked")),
        ({"schedule": "tiled"}, ("schedule", "tiled", "blocked")),
        ({"workspace_bytes": 1}, ("workspace_bytes", "1")),
    ],
    ids=str,
)
def test_errors(change: dict[str, object], words: tuple[str, ...]) -> None:
    arguments = {"input": torch.randn(5, 6), "weight": torch.randn(11, 6), "k": 3, **change}
    with pytest.raises(ValueError) as caught:
        fused_linear_topk(**arguments)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plan_says_what_it_takes() -> None:
    for k in (0, -1):
        with pytest.raises(ValueError, match="k:"):
            plan(9, 8, 50, loss="topk", k=k)
    with pytest.raises(ValueError, match="k:"):
        plan(9, 8, 50, loss="logprob", k=3)
    assert "topk of 9 tokens" in str(plan(9, 8, 50, loss="topk", k=3))
