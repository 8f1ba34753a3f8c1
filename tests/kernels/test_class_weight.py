"""Class weights, z-loss, predicted ids and accuracy of the cross-entropy, against PyTorch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels import layouts
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import assert_close, make_pair, single
from tests.helpers.kernel_cases import SINGLE, check, run

TOKENS, VOCAB = 13, 301
CLASSES = torch.rand(VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


def plain(
    *,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """PyTorch's cross-entropy, and Liger's z-loss: its mean is over the tokens counted."""
    z = input @ weight.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = (z / temperature).float() if z.dtype != torch.float64 else z / temperature
    classes = None if class_weight is None else class_weight.to(z)
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    keep = target != ignore_index
    each = torch.ones_like(z[:, 0]) if token_weight is None else token_weight.to(z)
    value = each * F.cross_entropy(z, target, weight=classes, reduction="none", **how)
    square = each * keep * z_loss * z.logsumexp(-1).square()
    if reduction == "none":
        return value + square
    if reduction == "sum":
        return value.sum() + square.sum()
    divisor = keep.sum() if classes is None else classes[target[keep]].sum()
    return value.sum() / divisor + square.sum() / keep.sum()


def inputs(seed: int = 0, vocab: int = VOCAB) -> dict[str, Tensor]:
    return single(make_pair(TOKENS, 19, vocab, masked=3, seed=seed))


def test_the_truth_is_pytorchs() -> None:
    case = inputs()
    z = case["input"] @ case["weight"].T + case["bias"]
    for smoothing, reduction in itertools.product((0.0, 0.1, 1.0), ("mean", "sum", "none")):
        how = {"reduction": reduction, "label_smoothing": smoothing}
        truth = F.cross_entropy(z, case["target"], weight=CLASSES, **how)
        torch.testing.assert_close(plain(**case, class_weight=CLASSES, **how), truth)


# Smoothing 0 and 1 drop a term each; z-loss and weights change the same gradient: they must meet.
@pytest.mark.parametrize("wrt", [SINGLE[:1], SINGLE], ids=["frozen", "trained"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("classes", [None, CLASSES], ids=["equal", "weighted"])
def test_of_the_cpu(
    cpu_backend: str, classes: Tensor | None, z_loss: float, smoothing: float, reduction: str, wrt
) -> None:
    how = {"label_smoothing": smoothing, "reduction": reduction, "z_loss": z_loss}
    how |= {"class_weight": classes, "temperature": 0.9, "softcap": 6.0}
    how["token_weight"] = torch.linspace(-1, 2, TOKENS)
    for dtype in (torch.float32, torch.float64):
        check(fused_linear_cross_entropy, plain, inputs(), wrt, dtype=dtype, **how)


# bf16 rounds the gradient once, whatever the terms: with smoothing and without is enough.
@pytest.mark.parametrize("wrt", [SINGLE[:1], SINGLE], ids=["frozen", "trained"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_bfloat16(cpu_backend: str, smoothing: float, wrt: tuple[str, ...]) -> None:
    how = {"label_smoothing": smoothing, "class_weight": CLASSES, "z_loss": 0.01}
    check(fused_linear_cross_entropy, plain, inputs(), wrt, dtype=torch.bfloat16, **how)


@pytest.mark.parametrize("wrt", [SINGLE[:1], SINGLE], ids=["frozen", "trained"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["blocked", "tiled", "streaming"])
def test_of_triton(
    schedule: str,
    smoothing: float,
    wrt: tuple[str, ...],
    triton_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layouts, "_SLICES", (128,))  # several slices of a small vocabulary
    monkeypatch.setattr(layouts, "_WAVES", ())
    case = inputs(vocab=150)
    how = {"label_smoothing": smoothing, "class_weight": CLASSES[:150].float(), "z_loss": 0.01}
    how["reduction"] = "mean" if wrt == SINGLE else "none"
    run_by = {"schedule": schedule, "workspace_bytes": 40_000}
    rules = {"device": triton_device, "max_factor": 4.0}
    check(fused_linear_cross_entropy, plain, case, wrt, only_ours=run_by, **rules, **how)


def test_classes_of_weight_0() -> None:
    """They count in neither sum, even if their entries are banned; without others the loss is 0."""
    case = inputs()
    banned = int(case["target"][0])
    case["bias"][banned] = -torch.inf
    classes = CLASSES.clone()
    classes[banned] = 0
    finite = {**case, "bias": case["bias"].clamp(min=-1e4)}
    for smoothing in (0.0, 0.1):
        how = {"class_weight": classes, "label_smoothing": smoothing}
        found, grads = run(fused_linear_cross_entropy, case, SINGLE[:2], [1.0], **how)
        truth, true_grads = run(plain, finite, SINGLE[:2], [1.0], **how)
        assert_close(found[0], truth[0])
        for name in SINGLE[:2]:
            assert_close(grads[name], true_grads[name], name=name)
    assert fused_linear_cross_entropy(**case, class_weight=torch.zeros(VOCAB)) == 0


def test_num_tokens_divides_both_parts() -> None:
    how = {"class_weight": CLASSES, "z_loss": 0.01}
    total = fused_linear_cross_entropy(**inputs(), reduction="sum", **how)
    assert_close(fused_linear_cross_entropy(**inputs(), num_tokens=7, **how), total / 7)


def test_vocab_size_cuts_the_head_to_the_classes() -> None:
    case, cut = inputs(), 290
    case["target"] = case["target"].clamp(max=cut - 1)
    how = {"class_weight": CLASSES[:cut], "label_smoothing": 0.1}
    found = fused_linear_cross_entropy(**case, vocab_size=cut, **how)
    case |= {name: case[name][:cut] for name in ("weight", "bias")}
    assert_close(found, plain(**case, **how))


@pytest.mark.parametrize(
    ("name", "wrong", "word"),
    [
        ("class_weight", torch.ones(VOCAB - 1), "300"),
        ("class_weight", torch.ones(VOCAB, 1), "(301, 1)"),
        ("class_weight", torch.ones(VOCAB, dtype=torch.long), "int64"),
        ("class_weight", torch.ones(VOCAB).requires_grad_(), "detach()"),
        ("class_weight", torch.ones(VOCAB, device="meta"), "meta"),
        ("class_weight", [1.0] * VOCAB, "list"),
        ("z_loss", -0.1, "-0.1"),
        ("z_loss", float("nan"), "nan"),
    ],
    ids=str,
)
def test_wrong_options(name: str, wrong: object, word: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        fused_linear_cross_entropy(**inputs(), **{name: wrong})
    assert name in str(caught.value) and word in str(caught.value)


# ------------------------------------------------------------------------- predicted ids, accuracy


def test_predicted_and_accuracy(place: tuple[str, str]) -> None:
    device, schedule = place
    case = {n: x.float() if x.is_floating_point() else x for n, x in inputs(1).items()}
    case["bias"][:] = 0
    case["weight"][[70, 200, 299]] = 3 * case["input"][:1]  # three equal logits, the row's largest
    z = case["input"].double() @ case["weight"].double().T
    keep = case["target"] != -100
    case["target"][4] = z[4].argmax()
    predicted = torch.where(keep, z.argmax(-1), -1)
    predicted[0] = 70
    case["target"][0] = 200
    keep[0] = keep[4] = True
    right = (predicted == case["target"])[keep].float().mean()
    there = {n: x.to(device) for n, x in case.items()}
    loss, stats = fused_linear_cross_entropy(**there, schedule=schedule, return_stats=True)
    assert stats["predicted"].dtype == torch.int64
    assert torch.equal(stats["predicted"].cpu(), predicted)
    torch.testing.assert_close(stats["accuracy"].cpu(), right)
    assert 0 < right < 1
    assert torch.equal(loss, fused_linear_cross_entropy(**there, schedule=schedule))
    _, stats = fused_linear_logprob(**there, schedule=schedule, return_stats=True)
    assert torch.equal(stats["predicted"].cpu(), predicted)


def test_shapes_of_statistics() -> None:
    case = inputs()
    case |= {"input": case["input"].view(1, TOKENS, -1), "target": case["target"].view(1, TOKENS)}
    _, stats = fused_linear_cross_entropy(**case, return_stats=True)
    assert stats["predicted"].shape == (1, TOKENS) and stats["accuracy"].shape == ()
    weight = torch.zeros(1, TOKENS)
    _, stats = fused_linear_cross_entropy(**case, token_weight=weight, return_stats=True)
    assert (stats["predicted"] == -1).all() and stats["accuracy"] == 0


def test_a_row_of_nan_predicts_an_entry_of_the_vocabulary(place: tuple[str, str]) -> None:
    device, schedule = place
    case = {n: x.float() if x.is_floating_point() else x for n, x in inputs().items()}
    case["input"][:] = torch.nan
    there = {n: x.to(device) for n, x in case.items()}
    _, stats = fused_linear_cross_entropy(**there, schedule=schedule, return_stats=True)
    assert (stats["predicted"] < VOCAB).all()
