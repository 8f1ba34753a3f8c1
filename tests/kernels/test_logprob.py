"""Log-probability, entropy and cross-entropy against float64 autograd on full logits."""

import pytest
import torch
import torch.nn.functional as F

from opsd_kernels import reference
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import assert_close, make_pair, random_upstream, single
from tests.helpers.kernel_cases import SINGLE, check, reference_entropy, run

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = [torch.float32, torch.float64]
WRT = [SINGLE[:1], SINGLE[1:2], SINGLE[2:], SINGLE[:2], SINGLE[::2], SINGLE[1:], SINGLE]


def inputs(
    tokens: int = 37, hidden: int = 19, vocab: int = 101, seed: int = 0
) -> dict[str, torch.Tensor]:
    return single(make_pair(tokens, hidden, vocab, masked=tokens // 8, seed=seed))


# The entropy adds a second gradient; fp64 takes another backend.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("return_entropy", [False, True])
def test_logprob_and_entropy(
    return_entropy: bool, wrt: tuple[str, ...], dtype: torch.dtype
) -> None:
    upstream = [random_upstream((37,), seed) for seed in range(2 if return_entropy else 1)]
    check(
        fused_linear_logprob,
        reference.linear_logprob,
        inputs(),
        wrt,
        dtype=dtype,
        upstream=upstream,
        return_entropy=return_entropy,
        temperature=0.8,
    )


def reference_lse(**arguments: object) -> tuple[torch.Tensor, ...]:
    """(logprob, entropy, lse) on full logits."""
    values = reference.linear_logprob(**arguments, return_entropy=True)
    names = ("input", "weight", "bias", "softcap", "temperature")
    hidden, weight, bias, softcap, temperature = (arguments[name] for name in names)
    z = reference.logits(hidden, weight, bias, softcap=softcap, temperature=temperature)
    return *values, torch.where(arguments["target"] != -100, z.logsumexp(-1), 0.0)


# Outputs used alone and together: an unused one has no upstream gradient.
@pytest.mark.parametrize("wrt", [SINGLE[:1], SINGLE], ids=["frozen", "trained"])
@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0, 2), (0,)], ids=str)
def test_lse_is_differentiable(used: tuple[int, ...], wrt: tuple[str, ...]) -> None:
    def chosen(fn: object, **how: object) -> object:
        return lambda **arguments: tuple(fn(**arguments, **how)[i] for i in used)

    ours = chosen(fused_linear_logprob, return_entropy=True, return_lse=True)
    upstream = [random_upstream((37,), seed) for seed in range(len(used))]
    options = {"temperature": 0.8, "softcap": 6.0, "upstream": upstream}
    for dtype in DTYPES:
        check(ours, chosen(reference_lse), inputs(), wrt, dtype=dtype, **options)


@pytest.mark.parametrize("schedule", ["blocked", "streaming"])
def test_lse_of_triton(schedule: str, triton_device: str) -> None:
    def lse(**arguments: object) -> torch.Tensor:
        return fused_linear_logprob(**arguments, return_lse=True, schedule=schedule)[1]

    def truth(**arguments: object) -> torch.Tensor:
        return reference_lse(**arguments)[2]

    options = {"temperature": 0.8, "softcap": 6.0, "upstream": [random_upstream((7,))]}
    case = inputs(7, 16, 150)
    check(lse, truth, case, SINGLE[:1], device=triton_device, max_factor=4.0, **options)


@pytest.mark.parametrize("wrt", [SINGLE[:1], SINGLE])
def test_entropy_alone_is_differentiable(wrt: tuple[str, ...]) -> None:
    def entropy_only(**arguments: object) -> torch.Tensor:
        return fused_linear_logprob(**arguments, return_entropy=True)[1]

    check(entropy_only, reference_entropy, inputs(seed=1), wrt, temperature=1.3, softcap=6.0)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (5, 8, 1), (33, 7, 257), (130, 64, 1003)])
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    case = inputs(*shape, seed=2)
    options = {"softcap": 8.0, "temperature": 1.2}
    dtype = torch.float64 if shape[2] == 1 else torch.float32
    for fn, truth in [
        (fused_linear_logprob, reference.linear_logprob),
        (fused_linear_cross_entropy, reference.linear_cross_entropy),
    ]:
        check(fn, truth, case, SINGLE, dtype=dtype, **options)


# Smoothing adds a term; gradients alone and together take other branches.
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float, wrt: tuple[str, ...], reduction: str) -> None:
    options = {"label_smoothing": smoothing, "reduction": reduction, "temperature": 0.9}
    check(fused_linear_cross_entropy, reference.linear_cross_entropy, inputs(), wrt, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_equals_torch(smoothing: float) -> None:
    case = inputs()
    z = reference.logits(case["input"], case["weight"], case["bias"])
    for reduction in ("mean", "sum", "none"):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        ours = fused_linear_cross_entropy(**case, **options)
        assert_close(ours, F.cross_entropy(z, case["target"], **options), name=reduction)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_weights_and_vocab_size(smoothing: float) -> None:
    case = inputs()
    case["target"] = case["target"].clamp(max=89)
    g = torch.Generator().manual_seed(0)
    weight = torch.rand(37, generator=g).round(decimals=1)
    weight[4] = 0.0
    options = {"label_smoothing": smoothing, "vocab_size": 90, "num_tokens": 50}
    check(
        fused_linear_cross_entropy,
        reference.linear_cross_entropy,
        case,
        SINGLE,
        dtype=torch.float64,
        token_weight=weight,
        **options,
    )


def test_stats() -> None:
    case = inputs(seed=3)
    keep = case["target"] != -100
    ls = reference.log_probs(case["input"], case["weight"], case["bias"])
    lse = reference.logits(case["input"], case["weight"], case["bias"]).logsumexp(-1)
    chosen = reference.logprob(ls, case["target"].clamp(min=0))
    truth = {"lse": lse, "entropy": reference.entropy(ls), "logprob": chosen}
    truth = {name: torch.where(keep, value, 0.0) for name, value in truth.items()}
    _, stats = fused_linear_logprob(**case, return_stats=True)
    assert set(stats) == {"lse", "entropy", "predicted"}
    value, entropy, more = fused_linear_logprob(**case, return_entropy=True, return_stats=True)
    assert_close(value, truth["logprob"])
    assert_close(entropy, truth["entropy"])
    assert set(more) == {"lse", "entropy", "predicted"}
    _, from_ce = fused_linear_cross_entropy(**case, return_stats=True)
    assert set(from_ce) == {*truth, "predicted", "accuracy"}
    for found in (stats, more, from_ce):
        assert not any(tensor.requires_grad for tensor in found.values())
        for name in set(found) & set(truth):
            assert_close(found[name], truth[name], name=name)


@pytest.mark.parametrize("fn", [fused_linear_logprob, fused_linear_cross_entropy])
def test_second_backward_gives_the_same_gradient(fn: object) -> None:
    case = inputs(seed=4)
    leaves = [case[name].requires_grad_() for name in SINGLE]
    loss = fn(**case).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for a, b, c in zip(first, kept, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_another_ignore_index() -> None:
    case = inputs(seed=5)
    other = dict(case, target=torch.where(case["target"] == -100, 7, case["target"]))
    for fn, truth in [
        (fused_linear_logprob, reference.linear_logprob),
        (fused_linear_cross_entropy, reference.linear_cross_entropy),
    ]:
        check(fn, truth, other, SINGLE, dtype=torch.float64, ignore_index=7)


def test_unused_entropy_leaves_the_logprob_gradient_alone() -> None:
    case = inputs(seed=6)
    upstream = random_upstream((37,))
    _, alone = run(fused_linear_logprob, case, SINGLE, [upstream])

    def logprob_only(**arguments: object) -> torch.Tensor:
        return fused_linear_logprob(**arguments, return_entropy=True)[0]

    _, beside = run(logprob_only, case, SINGLE, [upstream])
    for name in SINGLE:
        assert_close(beside[name], alone[name], name=name)
