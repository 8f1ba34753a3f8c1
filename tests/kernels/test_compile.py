"""torch.compile(fullgraph=True) of every public function: the same bits as eager, with backward."""

from collections.abc import Callable

import pytest
import torch
from torch.library import opcheck

from tests.helpers.compiled import (
    FROZEN,
    FUNCTIONS,
    Recorder,
    case,
    cross_entropy,
    equal_bits,
    jsd,
    jsd_none_stats,
    logprob_entropy_stats,
    logprob_targets,
)
from tests.helpers.kernel_cases import STUDENT, run


# Each set of gradients traces another operator.
@pytest.mark.parametrize("wrt", [(), FROZEN, STUDENT], ids=["forward", "frozen", "trained"])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_compiled_equals_eager(fn: Callable, wrt: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    equal_bits(fn, compiled, case(), wrt)


@pytest.mark.parametrize(
    ("dtype", "wrt"), [(torch.bfloat16, STUDENT), (torch.float16, FROZEN)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("fn", [jsd, logprob_entropy_stats, logprob_targets, cross_entropy])
def test_16_bits(fn: Callable, dtype: torch.dtype, wrt: tuple[str, ...]) -> None:
    """A frozen head's gradient of fp16 waits for backward in fp32."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    equal_bits(fn, compiled, case(dtype=dtype), wrt)
    with Recorder() as recorder:
        run(fn, case(dtype=dtype), wrt)
    for operator, args, kwargs in recorder.calls:
        opcheck(operator, args, kwargs, test_utils=("test_faketensor",))


@pytest.mark.parametrize("fn", [jsd, logprob_entropy_stats])
def test_token_count_may_vary(fn: Callable) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (24, 31, 7):
        equal_bits(fn, compiled, case(tokens), STUDENT)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("wrt", [(), FROZEN, STUDENT], ids=["forward", "frozen", "trained"])
@pytest.mark.parametrize(
    "fn", [jsd, jsd_none_stats, logprob_entropy_stats, logprob_targets, cross_entropy]
)
def test_fake_kernels_tell_the_truth(fn: Callable, wrt: tuple[str, ...], layout: str) -> None:
    """Shapes, dtypes and strides; inductor builds on them, aot_eager would not notice."""
    pair = case()
    if layout == "transposed":
        for name in ("student_input", "student_weight", "teacher_input"):
            pair[name] = pair[name].T.contiguous().T
    with Recorder() as recorder:
        run(fn, pair, wrt)
    assert recorder.calls
    for operator, args, kwargs in recorder.calls:
        opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("fn", [jsd, jsd_none_stats, cross_entropy])
def test_inductor(fn: Callable) -> None:
    torch._dynamo.reset()
    equal_bits(fn, torch.compile(fn, fullgraph=True), case(), STUDENT)
