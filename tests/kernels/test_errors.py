"""Wrong input: the message names the argument and what it got."""

import datetime
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import FusedLinearJSD, fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import make_pair, single

WRONG = (ValueError, TypeError)


def pair() -> dict[str, Tensor]:
    return make_pair(5, 6, 11, teacher_hidden=8, dtype=torch.float32)


def target_pair() -> dict[str, Tensor]:
    tensors = pair()
    tensors["target"] = tensors.pop("shift_labels")
    return tensors


def fails(fn: Callable, arguments: dict[str, object], *words: str, kind: object = WRONG) -> None:
    with pytest.raises(kind) as caught:
        fn(**arguments)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is missing in: {message}"


def labels(value: int) -> Tensor:
    return torch.tensor([0, 1, value, 2, 3])


NAN = float("nan")
# Change to the arguments, then the words its message must hold: the argument, and what it got.
DIVERGENCE = [
    ({"student_input": torch.randn(5, 7)}, "student_input", "7", "6"),
    ({"teacher_input": torch.randn(5, 9)}, "teacher_input", "9", "8"),
    ({"teacher_input": torch.randn(4, 8)}, "teacher_input", "4", "5"),
    ({"teacher_input": torch.randn(1, 8)}, "teacher_input", "1", "5"),
    ({"shift_labels": torch.zeros(4, dtype=torch.long)}, "shift_labels", "4", "5"),
    ({"shift_labels": torch.zeros(5, 1, dtype=torch.long)}, "shift_labels", "5, 1"),
    ({"shift_labels": torch.zeros(5)}, "shift_labels", "float32"),
    ({"shift_labels": torch.zeros(5, dtype=torch.bool)}, "shift_labels", "bool"),
    ({"shift_labels": labels(11)}, "shift_labels", "11"),
    ({"shift_labels": labels(-1)}, "shift_labels", "-1"),
    ({"shift_labels": labels(10), "vocab_size": 10}, "shift_labels", "10"),
    ({"student_weight": torch.randn(11)}, "student_weight", "11"),
    ({"student_weight": torch.randn(1, 11, 6)}, "student_weight", "1, 11, 6"),
    ({"teacher_weight": torch.randn(13, 8), "teacher_bias": None}, "vocab_size", "11", "13"),
    ({"student_input": torch.randn(5, 0), "student_weight": torch.randn(11, 0)}, "student_weight"),
    ({"teacher_input": torch.randn(5, 0), "teacher_weight": torch.randn(11, 0)}, "teacher_weight"),
    ({"student_weight": torch.randn(0, 6)}, "student_weight", "(0, 6)"),
    ({"student_bias": torch.randn(10)}, "student_bias", "10", "11"),
    ({"teacher_bias": torch.randn(11, 1)}, "teacher_bias", "11, 1"),
    ({"vocab_size": 12}, "vocab_size", "12", "11"),
    ({"vocab_size": 0}, "vocab_size", "0"),
    ({"vocab_size": -3}, "vocab_size", "-3"),
    ({"temperature": 0.0}, "temperature", "0"),
    ({"temperature": -1.5}, "temperature", "-1.5"),
    ({"temperature": NAN}, "temperature", "nan"),
    ({"token_clip": 0.0}, "token_clip", "0"),
    ({"token_clip": -0.25}, "token_clip", "-0.25"),
    ({"student_softcap": 0.0}, "student_softcap", "0"),
    ({"teacher_softcap": -2.5}, "teacher_softcap", "-2.5"),
    ({"student_logit_scale": 0.0}, "student_logit_scale", "0"),
    ({"student_logit_scale": NAN}, "student_logit_scale", "nan"),
    ({"teacher_logit_scale": -4.0}, "teacher_logit_scale", "-4.0"),
    ({"teacher_logit_scale": float("inf")}, "teacher_logit_scale", "inf"),
    ({"reduction": "avg"}, "reduction", "avg", "mean", "sum", "none"),
    ({"schedule": "fast"}, "schedule", "fast", "auto", "blocked"),
    ({"precision": "half"}, "precision", "half", "auto", "fp32", "difference"),
    ({"workspace_bytes": 0}, "workspace_bytes", "0"),
    ({"workspace_bytes": -4096}, "workspace_bytes", "-4096"),
    ({"num_tokens": 0}, "num_tokens", "0"),
    ({"num_tokens": -2.5}, "num_tokens", "-2.5"),
    ({"num_tokens": torch.tensor(0)}, "num_tokens", "0"),
    ({"num_tokens": torch.tensor([3, 4])}, "num_tokens", "one element", "(2,)"),
    ({"num_tokens": torch.ones(1, device="meta")}, "num_tokens", "meta", "cpu"),
    ({"num_tokens": 5, "reduction": "sum"}, "num_tokens", "sum", "mean"),
    ({"num_tokens": 5, "reduction": "none"}, "num_tokens", "none", "mean"),
    ({"token_weight": torch.ones(4)}, "token_weight", "4", "5"),
    ({"token_weight": torch.tensor(1.0)}, "token_weight", "5"),
    ({"token_weight": torch.ones(5, dtype=torch.long)}, "token_weight", "int64"),
    ({"token_weight": torch.ones(5).requires_grad_()}, "token_weight", "detach()"),
    ({"student_input": torch.ones(5, 6, dtype=torch.long)}, "student_input", "int64"),
    ({"teacher_weight": torch.ones(11, 8, dtype=torch.int8)}, "teacher_weight", "int8"),
    ({"teacher_input": torch.randn(5, 8, device="meta")}, "teacher_input", "meta", "cpu"),
    ({"shift_labels": torch.zeros(5, dtype=torch.long, device="meta")}, "shift_labels", "meta"),
    ({"student_input": [[0.0] * 6] * 5}, "student_input", "list"),
    ({"student_weight": None}, "student_weight", "None"),
]


def name_of(case: tuple) -> str:
    change = case[0]
    return ",".join(
        f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in change.items()
    )


@pytest.mark.parametrize("case", DIVERGENCE, ids=name_of)
def test_divergence(case: tuple) -> None:
    change, *words = case
    fails(fused_linear_jsd, {**pair(), **change}, *words)


@pytest.mark.parametrize("fn", [fused_linear_forward_kl, fused_linear_reverse_kl])
def test_kls_check_as_the_jsd_does(fn: Callable) -> None:
    fails(fn, {**pair(), "temperature": -1.5}, "temperature", "-1.5")
    fails(fn, {**pair(), "beta": 0.5}, "beta", kind=TypeError)


@pytest.mark.parametrize("beta", [-0.1, 1.1, NAN])
def test_beta(beta: float) -> None:
    fails(fused_linear_jsd, {**pair(), "beta": beta}, "beta", str(beta))
    with pytest.raises(WRONG, match="beta"):
        FusedLinearJSD(jsd_beta=beta)(**pair())


# Every tensor that can have a wrong dtype.
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("part", ["input", "weight"])
def test_dtypes_of_input_and_weight(who: str, part: str) -> None:
    change = {f"{who}_{part}": pair()[f"{who}_{part}"].bfloat16()}
    words = (f"{who}_input", f"{who}_weight", "bfloat16", "float32")
    fails(fused_linear_jsd, {**pair(), **change}, *words, kind=TypeError)


SINGLE_CASES = [
    ({"input": torch.randn(5, 7)}, "input", "7", "6"),
    ({"input": torch.randn(5, 6).double()}, "input", "float64", "float32"),
    ({"input": torch.randn(5, 0), "weight": torch.randn(11, 0)}, "weight", "(11, 0)"),
    ({"weight": torch.randn(0, 6), "bias": None}, "weight", "(0, 6)"),
    ({"target": torch.zeros(4, dtype=torch.long)}, "target", "4", "5"),
    ({"target": torch.zeros(5)}, "target", "float32"),
    ({"target": labels(11)}, "target", "11"),
    ({"target": labels(-7)}, "target", "-7"),
    ({"target": None}, "target", "None"),
    ({"bias": torch.randn(12)}, "bias", "12", "11"),
    ({"temperature": 0}, "temperature", "0"),
    ({"softcap": -30.0}, "softcap", "-30"),
    ({"logit_scale": 0.0}, "logit_scale", "0"),
    ({"logit_scale": float("inf")}, "logit_scale", "inf"),
    ({"vocab_size": 12}, "vocab_size", "12"),
    ({"schedule": "fast"}, "schedule", "fast"),
    ({"workspace_bytes": -1}, "workspace_bytes", "-1"),
    ({"weight": torch.randn(11, 6, device="meta")}, "weight", "meta"),
]


# Both functions of one head check the same arguments.
@pytest.mark.parametrize("fn", [fused_linear_logprob, fused_linear_cross_entropy])
@pytest.mark.parametrize("case", SINGLE_CASES, ids=name_of)
def test_one_distribution(case: tuple, fn: Callable) -> None:
    change, *words = case
    fails(fn, {**single(pair()), **change}, *words)


@pytest.mark.parametrize(
    "case",
    [
        ({"label_smoothing": -0.1}, "label_smoothing", "-0.1"),
        ({"label_smoothing": 1.5}, "label_smoothing", "1.5"),
        ({"reduction": "avg"}, "reduction", "avg"),
        ({"num_tokens": 0}, "num_tokens", "0"),
        ({"num_tokens": 5, "reduction": "sum"}, "num_tokens", "sum"),
        ({"token_weight": torch.ones(4)}, "token_weight", "4"),
        ({"token_weight": torch.ones(5).requires_grad_()}, "token_weight", "detach()"),
    ],
    ids=name_of,
)
def test_cross_entropy(case: tuple) -> None:
    change, *words = case
    fails(fused_linear_cross_entropy, {**single(pair()), **change}, *words)


@pytest.mark.parametrize(
    "case",
    [
        ({"teacher_input": torch.randn(4, 8)}, "teacher_input", "4"),
        ({"student_input": torch.randn(5, 0), "student_weight": torch.randn(11, 0)}, "(11, 0)"),
        ({"target": labels(11)}, "target", "11"),
        ({"target": torch.zeros(5)}, "target", "float32"),
        ({"teacher_softcap": 0.0}, "teacher_softcap", "0"),
        ({"teacher_logit_scale": 0.0}, "teacher_logit_scale", "0"),
        ({"temperature": -1.5}, "temperature", "-1.5"),
        ({"teacher_weight": torch.randn(13, 8), "teacher_bias": None}, "vocab_size", "13"),
    ],
    ids=name_of,
)
def test_advantage(case: tuple) -> None:
    change, *words = case
    fails(fused_linear_advantage, {**target_pair(), **change}, *words)


@pytest.mark.parametrize(
    "case",
    [
        ({"student_logprob": torch.zeros(4)}, "student_logprob", "4", "5"),
        ({"target": torch.zeros(4, dtype=torch.long)}, "target", "4", "5"),
        ({"reduction": "avg"}, "reduction", "avg"),
        ({"num_tokens": 0}, "num_tokens", "0"),
        ({"num_tokens": 5, "reduction": "none"}, "num_tokens", "none"),
        ({"token_weight": torch.ones(4)}, "token_weight", "4"),
        ({"token_weight": torch.ones(5).requires_grad_()}, "token_weight", "detach()"),
    ],
    ids=name_of,
)
def test_policy_gradient_loss(case: tuple) -> None:
    change, *words = case
    good = {"advantage": torch.zeros(5), "student_logprob": torch.zeros(5), "target": labels(0)}
    fails(policy_gradient_loss, {**good, **change}, *words)


@pytest.fixture
def one_process_group() -> object:
    store = dist.HashStore()
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["student_weight", "teacher_weight"])
def test_sharded_weight(one_process_group: object, name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    good = pair()
    good[name] = distribute_tensor(good[name], init_device_mesh("cpu", (1,)), [Shard(0)])
    fails(fused_linear_jsd, good, name, "DTensor", "full_tensor()")
    case = single(pair())
    case["weight"] = distribute_tensor(case["weight"], init_device_mesh("cpu", (1,)), [Shard(0)])
    fails(fused_linear_logprob, case, "weight", "DTensor", "full_tensor()")
