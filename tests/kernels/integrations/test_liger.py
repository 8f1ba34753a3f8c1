"""Liger's names for the JSD and the cross-entropy, against their formulas and Liger's own code."""

import inspect

import pytest
import torch
from torch import Tensor

from opsd_kernels import FusedLinearJSD
from opsd_kernels.integrations.liger import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
)
from opsd_kernels.testing import assert_close, cast, make_pair, single
from tests.helpers.kernel_cases import SINGLE, STUDENT, run

TOKENS, VOCAB = 14, 83
CLASSES = torch.rand(VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
DTYPES = [torch.float32, torch.bfloat16]


def pair(masked: int = 3, **how: object) -> dict[str, Tensor]:
    return make_pair(TOKENS, 12, VOCAB, teacher_hidden=17, masked=masked, **how)


def full(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def jsd(z_s: Tensor, z_t: Tensor, beta: float) -> Tensor:
    s, t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if beta == 0:
        return (t.exp() * (t - s)).sum(-1)
    if beta == 1:
        return (s.exp() * (s - t)).sum(-1)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


def plain_distillation(
    *,
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    return_soft_hard_loss: bool = False,
) -> tuple[Tensor, ...]:
    z_s = full(student_input @ student_weight.T + (0 if student_bias is None else student_bias))
    z_t = full(teacher_input @ teacher_weight.T + (0 if teacher_bias is None else teacher_bias))
    kept = shift_labels != ignore_index
    labels = shift_labels.clamp(min=0).unsqueeze(-1)
    count = kept.sum().clamp(min=1)
    hard = -(z_s.log_softmax(-1).gather(-1, labels).squeeze(-1) * kept).sum() / count
    missing = len(teacher_weight) - len(student_weight)
    z_s = torch.cat([z_s / temperature, z_s.new_zeros(len(z_s), missing)], -1)
    soft = (jsd(z_s, z_t / temperature, beta) * kept).sum() / count
    loss = weight_hard_loss * hard + weight_soft_loss * soft
    return (loss, soft.detach(), hard.detach()) if return_soft_hard_loss else (loss,)


def distillation(**case: object) -> tuple[Tensor, ...]:
    tensors = {name: case.pop(name) for name in list(case) if isinstance(case[name], Tensor)}
    tensors["true_labels"] = tensors.pop("shift_labels")
    result = LigerFusedLinearJSDLoss(**case)(**tensors)
    return (result,) if isinstance(result, Tensor) else result


# Each value of beta is another formula; the weights reach 0 and add to another number than 1.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
        {"weight_hard_loss": 1.0, "weight_soft_loss": 0.0},
        {"weight_hard_loss": 0.9, "weight_soft_loss": 0.4, "temperature": 2.0},
        {"temperature": 0.7, "ignore_index": 7, "return_soft_hard_loss": True},
    ],
)
def test_distillation(dtype: torch.dtype, beta: float, how: dict[str, object]) -> None:
    case = pair(masked=3 if "ignore_index" not in how else 0)
    if "ignore_index" in how:
        case["shift_labels"][[2, 5, 9]] = how["ignore_index"]
    close(distillation, plain_distillation, case, STUDENT, dtype, beta=beta, **how)


def close(fn, truth_fn, case: dict[str, Tensor], wrt, dtype: torch.dtype, **how: object) -> None:
    """fn in dtype against truth_fn in float64 on the same inputs, values and gradients.

    The room, relative to the largest entry, is that of sums in fp32; for bf16 gradients that of
    roundings by 2**-9 of two gradients and of their sum. Logits of bf16 inputs are not rounded.
    """
    inputs = cast(case, dtype)
    ours, our_grads = run(fn, inputs, wrt, **how)
    truth, true_grads = run(truth_fn, cast(inputs, torch.float64), wrt, **how)
    assert len(ours) == len(truth)
    for i, (a, t) in enumerate(zip(ours, truth, strict=True)):
        assert a.dtype == torch.float32
        assert_close(a, t, floor=1e-5, name=f"output {i}")
    for name in wrt:
        assert our_grads[name].dtype == dtype
        floor = 1e-5 if dtype == torch.float32 else 2**-7
        assert_close(our_grads[name], true_grads[name], floor=floor, name=f"gradient of {name}")


@pytest.mark.parametrize("how", [{}, {"weight_hard_loss": 0.0}, {"return_soft_hard_loss": True}])
@pytest.mark.parametrize("masked", [0, 3])
def test_distillation_without_biases(masked: int, how: dict[str, object]) -> None:
    case = {name: x for name, x in pair(masked).items() if not name.endswith("bias")}
    close(distillation, plain_distillation, case, STUDENT[:2], torch.float32, **how)


def test_a_teacher_with_more_rows_meets_logits_of_0() -> None:
    case = pair()
    case["shift_labels"] = case["shift_labels"].clamp(max=VOCAB - 6)
    case |= {name: case[name][:-5] for name in STUDENT[1:]}
    how = {"temperature": 1.3, "return_soft_hard_loss": True}
    close(distillation, plain_distillation, case, STUDENT, torch.float32, **how)


def test_a_batch_of_ignored_labels_gives_0() -> None:
    case = pair(masked=TOKENS)
    values, grads = run(distillation, case, STUDENT, [1.0], return_soft_hard_loss=True)
    assert all(value == 0 for value in values)
    assert all((grad == 0).all() for grad in grads.values())


def test_the_parts_carry_no_gradient() -> None:
    case = pair()
    case["student_input"].requires_grad_()
    loss, soft, hard = distillation(**case, return_soft_hard_loss=True)
    assert loss.requires_grad and not soft.requires_grad and not hard.requires_grad


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_distillation_is_ligers(beta: float, bias: bool) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as Theirs

    case = cast(pair(), torch.float32)
    names = [name for name in case if bias or not name.endswith("bias")]
    case, wrt = {name: case[name] for name in names}, STUDENT if bias else STUDENT[:2]
    options = (0.3, 0.6, beta, -100, 1.7, False, 4, True)  # by position, as callers pass them

    def of(cls: type) -> tuple[list[Tensor], dict[str, Tensor]]:
        def call(**tensors: Tensor) -> tuple[Tensor, ...]:
            order = ("student_input", "student_weight", "teacher_input", "teacher_weight")
            given = [tensors[name] for name in (*order, "shift_labels")]
            biases = (tensors.get("student_bias"), tensors.get("teacher_bias"))
            loss, soft, hard = cls(*options)(*given, *biases)
            return loss, soft.detach(), hard.detach()

        return run(call, case, wrt)

    ours, theirs = of(LigerFusedLinearJSDLoss), of(Theirs)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert_close(a, b, floor=1e-5)
    for name in wrt:
        assert_close(ours[1][name], theirs[1][name], floor=1e-5, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_jsd(dtype: torch.dtype, beta: float) -> None:
    assert LigerFusedLinearJSD is FusedLinearJSD

    def ours(**case: Tensor) -> Tensor:
        return LigerFusedLinearJSD(beta, -100, 1.4, torch.float32)(*case.values())

    def truth(**case: Tensor) -> tuple[Tensor, ...]:
        how = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "temperature": 1.4}
        return plain_distillation(**case, beta=beta, **how)

    case = {name: x for name, x in pair().items() if not name.endswith("bias")}
    close(ours, truth, case, STUDENT[:2], dtype)


def plain_cross_entropy(
    *,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    use_token_scaling: bool = False,
) -> tuple[Tensor, ...]:
    """Loss, z-loss, accuracy and predicted ids."""
    z = full(input @ weight.T + (0 if bias is None else bias))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp, kept = z.log_softmax(-1), target != ignore_index
    classes = (torch.ones(len(weight)) if ce_weight is None else ce_weight).to(z)
    label = torch.where(kept, target, 0)
    of_label = logp.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    value = -(1 - label_smoothing) * classes[label] * of_label
    value = value - label_smoothing / len(weight) * (logp @ classes)
    square = lse_square_scale * z.exp().sum(-1).log() ** 2
    scaling = of_label.exp().detach() * kept if use_token_scaling else kept.to(z)
    value, square = value * scaling, square * scaling
    predicted = torch.where(kept, z.argmax(-1), -1)
    right = ((predicted == target) & kept).to(z)
    if reduction == "none":
        return value + square, square.detach(), right, predicted
    value, square, right = value.sum(), square.sum(), right.sum() / kept.sum()
    if reduction == "mean":
        value, square = value / classes[target[kept]].sum(), square / kept.sum()
    return value + square, square.detach(), right, predicted


def cross_entropy(**case: object) -> tuple[Tensor, ...]:
    tensors = {name: case.pop(name) for name in ("input", "weight", "target")}
    bias = case.pop("bias", None)
    names = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens")
    loss_fn = LigerFusedLinearCrossEntropyLoss(**case, **dict.fromkeys(names, True))
    result = loss_fn(tensors["weight"], tensors["input"], tensors["target"], bias)
    assert isinstance(result, CrossEntropyOutput)
    return result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens.float()


# Every pair of options meets: terms of the loss share one gradient of the logits.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"ce_weight": CLASSES, "lse_square_scale": 1e-2},
        {"ce_weight": CLASSES, "label_smoothing": 0.1, "softcap": 5.0},
        {"lse_square_scale": 1e-2, "label_smoothing": 0.2, "ignore_index": 7},
        {"ce_weight": CLASSES, "lse_square_scale": 0.1, "label_smoothing": 0.3, "softcap": 30.0},
    ],
)
def test_cross_entropy(
    dtype: torch.dtype, reduction: str, scaled: bool, how: dict[str, object]
) -> None:
    case = single(pair(masked=3 if "ignore_index" not in how else 0))
    if "ignore_index" in how:
        case["target"][[2, 5, 9]] = how["ignore_index"]
    case["target"][1] = (case["input"] @ case["weight"].T + case["bias"])[1].argmax()
    options = {"reduction": reduction, "use_token_scaling": scaled, **how}
    close(cross_entropy, plain_cross_entropy, case, SINGLE, dtype, **options)
    close(cross_entropy, plain_cross_entropy, case, SINGLE[:1], dtype, **options)


def test_cross_entropy_alone_is_a_tensor() -> None:
    case = {name: x for name, x in single(pair()).items() if name != "bias"}

    def alone(*, input: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
        return LigerFusedLinearCrossEntropyLoss(reduction=reduction)(weight, input, target)

    def truth(**case: Tensor) -> Tensor:
        return plain_cross_entropy(**case)[0]

    for reduction in ("mean", "sum", "none"):
        close(alone, truth, case, SINGLE[:2], torch.float32, reduction=reduction)


def test_only_what_is_asked_for_is_returned() -> None:
    case = single(pair())
    for name in ("z_loss", "token_accuracy", "predicted_tokens"):
        loss_fn = LigerFusedLinearCrossEntropyLoss(**{f"return_{name}": True})
        output = loss_fn(case["weight"], case["input"], case["target"])
        others = {"z_loss", "token_accuracy", "predicted_tokens"} - {name}
        assert getattr(output, name) is not None
        assert all(getattr(output, other) is None for other in others)


def test_a_token_of_probability_0_keeps_its_prediction() -> None:
    """Its weight under token scaling is 0, which would drop it."""
    case = {"input": torch.eye(2) * 300, "weight": torch.eye(2), "target": torch.tensor([1, 1])}
    loss, _, accuracy, predicted = cross_entropy(**case, use_token_scaling=True)
    assert 0 <= loss < 1e-30 and accuracy == 0.5 and predicted.tolist() == [0, 1]


def test_a_batch_of_ignored_targets_gives_0() -> None:
    case = single(pair(masked=TOKENS))
    how = {"lse_square_scale": 0.1, "ce_weight": CLASSES, "use_token_scaling": True}
    values, grads = run(cross_entropy, case, SINGLE, [1.0], **how)
    assert [value.item() for value in values[:3]] == [0, 0, 0] and (values[3] == -1).all()
    assert all((grad == 0).all() for grad in grads.values())


def test_the_order_of_arguments_is_ligers() -> None:
    from liger_kernel import chunked_loss, transformers

    pairs = [
        (LigerFusedLinearJSDLoss, chunked_loss.LigerFusedLinearJSDLoss),
        (LigerFusedLinearCrossEntropyLoss, transformers.LigerFusedLinearCrossEntropyLoss),
        (LigerFusedLinearJSD, transformers.LigerFusedLinearJSD),
    ]
    for ours, theirs in pairs:
        for name in ("__init__", "forward"):
            accepted, expected = (
                inspect.signature(getattr(cls, name)).parameters.values() for cls in (ours, theirs)
            )
            # FusedLinearJSD has options and tensors of its own behind Liger's, by name only.
            accepted = [p for p in accepted if p.kind is not p.KEYWORD_ONLY]
            assert [p.name for p in accepted] == [p.name for p in expected]
            given = [
                (a, e) for a, e in zip(accepted, expected, strict=True) if e.default != e.empty
            ]
            assert all(a.default == e.default for a, e in given)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"lse_square_scale": -1.0}, "lse_square_scale: expected a finite number"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\]"),
        ({"softcap": 0.0}, "softcap: expected a positive"),
        ({"reduction": "max"}, "reduction: expected one of"),
        ({"ce_weight": CLASSES[:-1]}, rf"ce_weight: expected shape \({VOCAB},\)"),
        ({"ce_weight": CLASSES.clone().requires_grad_()}, "ce_weight: requires_grad"),
        ({"ce_weight": torch.ones(VOCAB).long()}, "ce_weight: expected a floating-point"),
        ({"accum_dtype": "fp32"}, "accum_dtype: expected a torch.dtype"),
    ],
)
def test_cross_entropy_refuses(how: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        cross_entropy(**single(pair()), **how)


def test_distillation_refuses() -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive"):
        LigerFusedLinearJSDLoss(temperature=0.0)
    with pytest.raises(ValueError, match="beta: expected"):
        distillation(**pair(), beta=1.5)
    case = pair()
    case |= {name: case[name][:-5] for name in ("teacher_weight", "teacher_bias")}
    with pytest.raises(ValueError, match="teacher_weight: has 78 vocabulary rows"):
        distillation(**case)
