"""What is the C++ operators' own: threads, instruction sets, operands, memory, fallback."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from opsd_kernels import extension, plan, reference
from opsd_kernels.backends import cpp_backend
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import assert_close, cast, make_pair
from tests.helpers.kernel_cases import LOSSES, STUDENT, check, prepare, run, same_bits

ROOT = Path(__file__).resolve().parents[2]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
built = pytest.mark.skipif(not extension.loaded(), reason="the C++ operators are not built")


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@built
@DTYPES
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_the_pytorch_backend_on_any_number_of_threads(
    name: str, dtype: torch.dtype, threads: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks of the vocabulary, rows beyond a tile; bits do not depend on the threads."""
    pair = cast(make_pair(150, 33, 2500, masked=9, seed=5), dtype)
    loss, inputs, wrt, options = prepare(name, pair, True, None)
    _, true = run(loss.truth, cast(inputs, torch.float64), wrt, **options)
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(run(loss.fn, inputs, wrt, **options))
    for other in results[1:]:
        # Products of the gradients are the library's, which may sum in another order.
        assert all(torch.equal(a, b) for a, b in zip(results[0][0], other[0], strict=True))
    monkeypatch.setattr(extension, "serves", lambda *_: False)
    plain, plain_grads = run(loss.fn, inputs, wrt, **options)
    for outputs, grads in results:
        for a, b in zip(outputs, plain, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for key in wrt:
            assert_close(grads[key], true[key], plain_grads[key], max_factor=4.0, name=key)


@built
@DTYPES
@pytest.mark.parametrize("vocab", [5, 31, 70])
def test_no_logits_are_left_where_a_product_may_read(vocab: int, dtype: torch.dtype) -> None:
    """A 16-bit dz leaves half of each row; a processor with AMX reads on to a whole tile."""
    hidden, logits = torch.zeros(3, 4, dtype=dtype), torch.full((2, 3, vocab), torch.nan)
    tiles = cpp_backend._Tiles([], [hidden], logits, False, True, None)
    tiles.dz().fill_(1.0)
    tiles.clear_beyond()
    rows = logits[0].view(dtype)
    assert (rows[:, :vocab] == 1).all() and (rows[:, vocab : vocab + 32] == 0).all()


@built
@DTYPES
def test_same_bits_twice(dtype: torch.dtype) -> None:
    pair = cast(make_pair(150, 33, 2500, masked=9, seed=6), dtype)
    same_bits(*(run(fused_linear_jsd, pair, STUDENT) for _ in range(2)))


@built
@DTYPES
def test_operands_of_any_stride(dtype: torch.dtype) -> None:
    pair = cast(make_pair(40, 17, 300, seed=7), dtype)
    strided = dict(pair)
    strided["student_weight"] = pair["student_weight"].t().contiguous().t()
    wide = torch.zeros(40, 34, dtype=dtype)
    strided["student_input"] = wide[:, ::2].copy_(pair["student_input"])
    strided["teacher_weight"] = pair["teacher_weight"].repeat(1, 2)[:, :17]
    ours, plain = (run(fused_linear_jsd, p, STUDENT[:1]) for p in (strided, pair))
    assert torch.equal(ours[0][0], plain[0][0])
    assert_close(ours[1]["student_input"], plain[1]["student_input"])


@built
def test_teacher_of_another_dtype_and_size() -> None:
    pair = make_pair(40, 17, 300, teacher_hidden=29, seed=8)
    for student, teacher in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        mixed = {
            k: v.to(teacher if k.startswith("teacher") else student)
            if v.is_floating_point() else v for k, v in pair.items()
        }  # fmt: skip
        _, grads = run(fused_linear_jsd, mixed, STUDENT[:1])
        _, true = run(reference.linear_jsd, cast(mixed, torch.float64), STUDENT[:1])
        _, near = run(reference.linear_jsd, cast(mixed, student), STUDENT[:1])
        assert_close(grads["student_input"], true["student_input"], near["student_input"])


@built
@pytest.mark.parametrize(("wrt", "products"), [((), 0), (STUDENT[:1], 1), (STUDENT[:2], 2)])
def test_reads_the_head_once_a_block(wrt: tuple[str, ...], products: int) -> None:
    pair = make_pair(1000, 16, 300, dtype=torch.float32)
    chosen = plan(1000, 16, 300, grad_input=bool(wrt), grad_weight=len(wrt) > 1)
    assert chosen.backend == "cpp"
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run(fused_linear_jsd, pair, wrt)
    counts = {x.key: x.count for x in recorded.key_averages()}
    assert counts["opsd_cpu::statistics"] == chosen.num_blocks
    found = counts.get("aten::mm", 0) + counts.get("aten::addmm_", 0)
    assert found == products * chosen.num_blocks


@built
@pytest.mark.parametrize(
    ("marks", "fewest"),
    [
        ("not slow and not exhaustive", 241),
        pytest.param("not slow", 376, marks=pytest.mark.exhaustive),
    ],
    ids=["pairwise", "all"],
)
@pytest.mark.parametrize(
    "environment",
    [
        {"ATEN_CPU_CAPABILITY": "default"},
        pytest.param({"ATEN_CPU_CAPABILITY": "avx2"}, marks=pytest.mark.exhaustive),
        # Without bfloat16 products.
        pytest.param({"ONEDNN_MAX_CPU_ISA": "AVX2"}, marks=pytest.mark.exhaustive),
    ],
    ids=["plain", "avx2", "widened"],
)
def test_other_instruction_sets(environment: dict[str, str], marks: str, fewest: int) -> None:
    """The code of lesser machines passes the same tests."""
    names = ["cpp", "low_precision", "divergence", "logprob", "topk"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", marks, "--backend", "cpp", "-k",
         "not instruction and not torch.float16 and not float16_ and not float64 and not grows",
         *(f"tests/kernels/test_{name}.py" for name in names)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= fewest, f"{passed} tests: the selection lost some"


GROWS = """
import json
import torch
from benchmarks.resident import resident
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import make_pair, single

pair = make_pair(70, 32, 3000, dtype=torch.bfloat16)
for name in ("student_input", "student_weight"):
    pair[name].requires_grad_()
def calls(count):
    for i in range(count):
        fused_linear_jsd(**pair, beta=0.5, return_stats=True)[0].backward()
        sum(x.sum() for x in fused_linear_logprob(**single(pair), return_entropy=True)).backward()
calls(200)
before = resident()
calls(1000)
print(json.dumps(resident() - before))
"""


@built
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_grows_no_more_after_1000_calls() -> None:
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", GROWS], env={**os.environ, **path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 2 * 2**20


def test_without_the_operators_pytorch_serves_and_one_warning_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extension.loaded.cache_clear()
    try:
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            check(fused_linear_jsd, reference.linear_jsd, make_pair(9, 8, 50), STUDENT)
            assert plan(9, 8, 50).backend == "torch"
            assert plan(9, 8, 50, dtype=torch.float64).backend == "torch"
        assert [str(w.message) for w in caught if "--no-build-isolation" in str(w.message)] == [
            str(caught[0].message)
        ]
    finally:
        extension.loaded.cache_clear()


@built
def test_operators_match_their_schema() -> None:
    pair = make_pair(5, 4, 30, dtype=torch.float32)
    hidden = [pair["student_input"], pair["teacher_input"]]
    weight = [pair["student_weight"], pair["teacher_weight"]]
    logits, out = torch.zeros(2, 5, 30), torch.zeros(6, 5)
    ops = torch.ops.opsd_cpu
    checks = ("test_schema",)
    empty = (None, 0, False, False, False, None, 0)
    arguments = (hidden, weight, [None, None], [0.0, 0.0], [1.0, 1.0], *empty)
    torch.library.opcheck(ops.statistics, (*arguments, logits, out), test_utils=checks)
    ops.statistics(*arguments, logits, out)
    numbers = (2, 30.0, 1.0, 0.5, None, 2, True)
    torch.library.opcheck(ops.divergence_sums, (logits, out, *numbers), test_utils=checks)


@built
def test_wrong_operands_are_refused() -> None:
    ops = torch.ops.opsd_cpu
    with pytest.raises(RuntimeError, match="layout"):
        h: Tensor = torch.zeros(5, 4)
        ops.statistics(
            [h], [torch.zeros(9, 4)], [None], [0.0], [1.0], None, 0, False, False, False, None, 2,
            torch.zeros(0), torch.zeros(9, 5),
        )  # fmt: skip
