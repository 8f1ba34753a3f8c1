"""Where operators run: under the device of their tensors, and outside CUDA graphs.

What needs a GPU is in test_cuda_graphs and test_two_devices.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.ops import divergence, logprob, targets, topk
from opsd_kernels.testing import make_pair
from tests.helpers import compiled
from tests.helpers.compiled import Recorder, equal_bits
from tests.helpers.kernel_cases import LOSSES, STUDENT, prepare, run

OPERATORS = (
    "divergence_tokens",
    "divergence_sum",
    "logprob_tokens",
    "logprob_sum",
    "targets_tokens",
    "targets_sum",
    "topk",
)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Devices under which backends were entered, for tensors that report cuda:1."""
    current, entered = [0], []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.get_device())
        yield
        current.pop()

    def recorded(module: object) -> Callable:
        choose = module.backend_of

        def backend_of(chosen: object) -> object:
            entered.append(current[-1])
            return choose(chosen)

        return backend_of

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
    for module in (divergence, logprob, targets, topk):
        monkeypatch.setattr(module, "backend_of", recorded(module))
    return entered


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", LOSSES)
def test_backends_run_under_the_device_of_their_tensors(
    name: str, trained: bool, entered: list[int]
) -> None:
    """In forward and in the calls that backward makes."""
    loss, inputs, wrt, options = prepare(name, make_pair(5, 6, 11), trained, None)
    run(loss.fn, inputs, wrt, **options)
    assert entered and set(entered) == {1}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("fn", [compiled.logprob_targets, compiled.top_k])
def test_top_k_and_several_targets_do_too(fn: Callable, trained: bool, entered: list[int]) -> None:
    run(fn, compiled.case(), STUDENT if trained else STUDENT[:1])
    assert entered and set(entered) == {1}


# ------------------------------------------------------------------------------------ CUDA graphs


@pytest.mark.parametrize("name", OPERATORS)
def test_inductor_leaves_operators_that_read_on_the_host_out_of_its_graphs(name: str) -> None:
    operator = getattr(torch.ops.opsd_kernels, name).default
    assert torch.Tag.cudagraph_unsafe in operator.tags


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors seem to be on a GPU whose current stream is captured."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def refused(name: str, call: Callable) -> None:
    """One clear error, and no operation before it that the graph would hold."""
    with Recorder(namespace=None) as seen, pytest.raises(RuntimeError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "outside torch.cuda.graph" in message
    assert "\n" not in message
    assert seen.calls == []


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_read_on_the_host_is_refused_by_name(name: str, capturing: None) -> None:
    loss, inputs, _, options = prepare(name, make_pair(5, 6, 11), False, None)
    argument = "shift_labels" if "shift_labels" in inputs else "target"
    refused(argument, lambda: loss.fn(**inputs, **options))


def test_top_k_and_several_targets_are_refused_by_name(capturing: None) -> None:
    hidden, weight, labels = compiled.student(make_pair(5, 6, 11))
    several = labels[:, None]
    refused("target", lambda: fused_linear_logprob(hidden, weight, several))
    refused("shift_labels", lambda: fused_linear_topk(hidden, weight, 3, shift_labels=labels))
    assert fused_linear_topk(hidden, weight, 3)[0].isfinite().all()


def test_weights_are_refused_by_name(capturing: None) -> None:
    pair = {**make_pair(5, 6, 11), "token_weight": torch.ones(5)}
    del pair["shift_labels"]
    refused("token_weight", lambda: fused_linear_jsd(**pair))


# Each combination calls another operator.
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_labels_nothing_is_refused(
    reduction: str, trained: bool, capturing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(5, 6, 11, dtype=torch.float32)
    del pair["shift_labels"]
    wrt = STUDENT if trained else STUDENT[:1]
    values, grads = run(fused_linear_jsd, pair, wrt, reduction=reduction)
    monkeypatch.undo()
    expected, right = run(fused_linear_jsd, pair, wrt, reduction=reduction)
    assert torch.equal(values[0], expected[0])
    for name in wrt:
        torch.testing.assert_close(grads[name], right[name])


def test_a_backward_that_reads_labels_is_refused_under_capture(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Forward ran before the capture; of a trained head, backward computes anew."""
    pair = make_pair(5, 6, 11, masked=1)
    weight = pair["student_weight"].requires_grad_()
    loss = fused_linear_jsd(**pair, reduction="none")
    request.getfixturevalue("capturing")
    with pytest.raises(RuntimeError, match=r"^shift_labels: is read on the host"):
        torch.autograd.grad(loss.sum(), weight)


def without_labels(**p: Tensor) -> Tensor:
    p.pop("shift_labels")
    return fused_linear_jsd(**p)


@pytest.mark.slow
@pytest.mark.parametrize("fn", [fused_linear_jsd, without_labels])
def test_reduce_overhead_equals_eager(fn: Callable) -> None:
    """On the CPU no graph is captured; test_cuda_graphs has the GPU's."""
    torch._dynamo.reset()
    pair = make_pair(24, 12, 70, masked=3, dtype=torch.float32)
    equal_bits(fn, torch.compile(fn, mode="reduce-overhead", fullgraph=True), pair, STUDENT)


# ------------------------------------------------------------------- gradients scaled in one kernel


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("rows", [False, True], ids=["one factor", "a factor per row"])
@pytest.mark.parametrize(
    ("grad", "out"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        # Which Triton's interpreter computes wrongly.
        pytest.param(torch.float32, torch.bfloat16, marks=ON_A_GPU),
        pytest.param(torch.bfloat16, torch.bfloat16, marks=ON_A_GPU),
    ],
    ids=str,
)
def test_one_kernel_gives_the_bits_of_the_slices(
    grad: torch.dtype,
    out: torch.dtype,
    rows: bool,
    triton_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from opsd_kernels.backends import triton_scale
    from opsd_kernels.ops import common

    monkeypatch.setattr(triton_scale, "_COLUMNS", 64)  # three programs a row
    monkeypatch.setattr(common, "_SLICE_ELEMENTS", 1000)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(37, 130, generator=g).to(grad)
    factor = (torch.rand(37, generator=g) if rows else torch.rand((), generator=g)) / 57
    if rows:  # a row whose gradient nobody asked for, and which has none
        factor[5], x[5] = 0.0, torch.nan
    sliced = torch.empty(37, 130, dtype=out)
    common._scaled_in_slices(x, factor, sliced)
    found = scaled(x, factor, out, triton_device)
    assert torch.equal(found, sliced.nan_to_num(nan=0.0))
    exact = (x.double() * factor.double().reshape(-1, 1)).nan_to_num(nan=0.0)
    torch.testing.assert_close(found.double(), exact, rtol=0.004, atol=1e-6)
    if not rows:  # a bias
        assert torch.equal(scaled(x[0], factor, out, triton_device), sliced[0])


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    from opsd_kernels.backends.triton_scale import scale_into

    found = torch.empty(x.shape, dtype=dtype, device=device)
    scale_into(x.to(device), factor.to(device), found)
    return found.cpu()
