"""CUDA graphs: captured by hand without labels, by inductor with and without them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import STUDENT, move, run, same_bits
from tests.helpers.triton_cases import TRAINED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = (96, 64, 1111)


def case(seed: int, labels: bool = True) -> dict[str, Tensor]:
    pair = move(make_pair(*SIZES, masked=9, dtype=torch.bfloat16, seed=seed), "cuda")
    if not labels:
        del pair["shift_labels"]
    return pair


# Each schedule and reduction captures other kernels; beta 0 has one pass, 0.5 two.
@TRAINED
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("schedule", ["blocked", "streaming"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_captured_call_is_replayed_on_other_inputs(
    beta: float, schedule: str, reduction: str, trained: bool
) -> None:
    static, names = case(1, labels=False), STUDENT if trained else STUDENT[:1]
    leaves = [static[name].requires_grad_() for name in names]
    options = {"beta": beta, "schedule": schedule, "reduction": reduction}

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = fused_linear_jsd(**static, **options)
        return loss, torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # kernels are compiled, libraries loaded
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grads = step()
    for seed in (2, 3):
        other = case(seed, labels=False)
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(other[name])
        graph.replay()
        upstream = [torch.ones_like(loss)]
        values, expected = run(fused_linear_jsd, other, names, upstream, **options)
        same_bits((values, expected), ([loss], dict(zip(names, grads, strict=True))))


@pytest.mark.parametrize("schedule", ["blocked", "tiled"])
def test_a_captured_top_k_is_replayed_on_other_inputs(schedule: str) -> None:
    static = case(1, labels=False)

    def call(pair: dict[str, Tensor]) -> list[Tensor]:
        teacher = pair["teacher_input"], pair["teacher_weight"]
        how = {"bias": pair["teacher_bias"], "schedule": schedule}
        return list(fused_linear_topk(*teacher, 20, **how))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(static)  # kernels are compiled, libraries loaded
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(static)
    for seed in (2, 3):
        other = case(seed, labels=False)
        for name, tensor in static.items():
            tensor.copy_(other[name])
        graph.replay()
        same_bits((call(other), {}), (found, {}))


@pytest.mark.parametrize(
    "argument", ["shift_labels", "token_weight", "target", "several targets", "labels of top-k"]
)
def test_what_is_read_on_the_host_is_refused_and_nothing_breaks(argument: str) -> None:
    pair = case(4, labels=argument == "shift_labels")
    if argument == "token_weight":
        pair["token_weight"] = torch.ones(SIZES[0], device="cuda")
    student = pair["student_input"], pair["student_weight"]
    ids = torch.arange(3, device="cuda").expand(SIZES[0], 3)

    def call() -> Tensor:
        if argument == "target":
            target = torch.zeros(SIZES[0], dtype=torch.long, device="cuda")
            return fused_linear_cross_entropy(*student, target)
        if argument == "several targets":
            return fused_linear_logprob(*student, ids)
        if argument == "labels of top-k":
            return fused_linear_topk(*student, 3, shift_labels=ids[:, 0])[0]
        return fused_linear_jsd(**pair)

    expected = call()
    name = {"several targets": "target", "labels of top-k": "shift_labels"}.get(argument, argument)
    with pytest.raises(RuntimeError, match=rf"^{name}: is read on the host"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
    assert torch.equal(call(), expected)


def with_labels(**p: Tensor) -> Tensor:
    return fused_linear_jsd(**p, reduction="none")


def without_labels(**p: Tensor) -> Tensor:
    p.pop("shift_labels")
    return fused_linear_jsd(**p, reduction="none")


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@TRAINED
@pytest.mark.parametrize("fn", [with_labels, without_labels])
def test_reduce_overhead_equals_eager(fn: Callable, trained: bool, fresh: None) -> None:
    """Inductor records, warms up and replays: the third call is a replay."""
    names = STUDENT if trained else STUDENT[:1]
    compiled = torch.compile(fn, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        pair = case(seed)
        torch.compiler.cudagraph_mark_step_begin()
        same_bits(run(fn, pair, names), run(compiled, pair, names))
