"""What stands at an ignored token, or one of weight 0, reaches no value and no gradient."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opsd_kernels as k
from opsd_kernels.testing import make_pair

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=12, deadline=None, derandomize=True)
TOKENS = 9
LEAVES = ("student_input", "student_weight", "student_bias")


class Case(NamedTuple):
    fn: Callable[..., Tensor]  # of the pair, the reduction and, where it has one, token_weight
    inputs: tuple[str, ...]  # one value, or one row, per token
    weighted: bool


def two_heads(fn: Callable, **options: object) -> Case:
    return Case(
        lambda p, **how: fn(**without(p, "advantage"), **options, **how),
        ("student_input", "teacher_input", "token_weight"),
        True,
    )


def without(p: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in p.items() if name not in names}


def student(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return p["student_input"], p["student_weight"], p["shift_labels"]


def cross_entropy(p: dict[str, Tensor], **how: object) -> Tensor:
    how |= {"bias": p["student_bias"], "token_weight": p.get("token_weight")}
    return k.fused_linear_cross_entropy(*student(p), label_smoothing=0.1, **how)


def logprob_and_entropy(p: dict[str, Tensor], **how: object) -> Tensor:
    values = k.fused_linear_logprob(*student(p), bias=p["student_bias"], return_entropy=True)
    return reduced(values[0] + 2 * values[1], p["shift_labels"], how)


def advantage(p: dict[str, Tensor], **how: object) -> Tensor:
    p = without(p, "advantage", "token_weight")
    gap, chosen = k.fused_linear_advantage(**without(p, "shift_labels"), target=p["shift_labels"])
    return reduced(gap + chosen, p["shift_labels"], how)


def policy_gradient(p: dict[str, Tensor], **how: object) -> Tensor:
    chosen = k.fused_linear_logprob(*student(p), bias=p["student_bias"])
    how |= {"token_weight": p.get("token_weight")}
    return k.policy_gradient_loss(p["advantage"], chosen, p["shift_labels"], **how)


def reduced(values: Tensor, labels: Tensor, how: dict[str, object]) -> Tensor:
    """Values per token as the other losses reduce theirs."""
    return values if how["reduction"] == "none" else values.sum() / how.get("num_tokens", 1)


CASES = {
    "jsd": two_heads(k.fused_linear_jsd, beta=0.3),
    "jsd clipped": two_heads(k.fused_linear_jsd, token_clip=0.01),
    "forward kl": two_heads(k.fused_linear_forward_kl),
    "reverse kl": two_heads(k.fused_linear_reverse_kl),
    "cross-entropy": Case(cross_entropy, ("student_input", "token_weight"), True),
    "logprob and entropy": Case(logprob_and_entropy, ("student_input",), False),
    "advantage": Case(advantage, ("student_input", "teacher_input"), False),
    "policy gradient": Case(policy_gradient, ("student_input", "advantage", "token_weight"), True),
}
REDUCTIONS = [{"reduction": "mean", "num_tokens": 7}, {"reduction": "sum"}, {"reduction": "none"}]
POISON = [float("nan"), float("inf"), float("-inf")]


def result(
    case: Case, p: dict[str, Tensor], trained: bool, how: dict[str, object], upstream: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients; upstream (N,) is what flows into reduction "none"."""
    names = LEAVES if trained else LEAVES[:1]
    leaves = {name: p[name].clone().requires_grad_() for name in names}
    value = case.fn({**p, **leaves}, **how)
    grads = torch.autograd.grad(value, leaves.values(), upstream if value.ndim else None)
    return value.detach(), dict(zip(names, grads, strict=True))


def compare(
    name: str, seed: int, by_weight: bool, trained: bool, how: dict[str, object], poison: float
) -> None:
    """Poisoned masked tokens against the same call without those tokens."""
    case = CASES[name]
    p = make_pair(TOKENS, 8, 37, seed=seed, dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(TOKENS, generator=g) < 0.4
    p["advantage"], upstream = torch.randn(2, TOKENS, generator=g)
    if case.weighted:
        p["token_weight"] = torch.rand(TOKENS, generator=g) + 0.5
    rows = (*case.inputs, "shift_labels", "advantage", "teacher_input")
    alone = {n: v[~masked] if n in rows else v for n, v in p.items()}
    truth, true_grads = result(case, alone, trained, how, upstream[~masked])
    for poisoned in case.inputs:
        p[poisoned] = p[poisoned].clone()
        p[poisoned][masked] = poison
    if by_weight:
        p["token_weight"][masked] = 0
    else:
        p["shift_labels"][masked] = -100
        upstream[masked] = poison
    value, grads = result(case, p, trained, how, upstream)
    if value.ndim:
        assert (value[masked] == 0).all()
        value = value[~masked]
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    assert (grads["student_input"][masked] == 0).all()
    grads["student_input"] = grads["student_input"][~masked]
    for leaf, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[leaf], rtol=1e-5, atol=1e-6, msg=leaf)


@pytest.mark.parametrize(
    ("name", "by_weight"),
    [(name, w) for name, case in CASES.items() for w in (False, True) if case.weighted or not w],
)
@quick
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(REDUCTIONS), st.sampled_from(POISON))
def test_masked_tokens_reach_nothing(
    cpu_backend: str, name: str, by_weight: bool, seed: int, trained: bool, how, poison: float
) -> None:
    compare(name, seed, by_weight, trained, how, poison)


# One loss for each way in which a kernel skips rows.
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["jsd", "reverse kl", "cross-entropy", "policy gradient"])
def test_on_every_schedule(name: str, trained: bool, triton_device: str) -> None:
    if triton_device == "cuda":
        pytest.skip("the tensors are the CPU's, where Triton is interpreted")
    for how, by_weight in ((REDUCTIONS[0], False), (REDUCTIONS[2], True)):
        compare(name, 3, by_weight, trained, how, float("nan"))


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("name", ["jsd", "cross-entropy"])
def test_rows_are_gathered_only_where_labels_drop_some(
    name: str, dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering needs another copy of the hidden states, and another answer from the device."""
    from opsd_kernels.backends.context import LossContext

    kept, whole = [], LossContext.__init__

    def watched(context: LossContext, *how: object) -> None:
        whole(context, *how)
        kept.append(context.kept)

    monkeypatch.setattr(LossContext, "__init__", watched)
    pair = make_pair(TOKENS, 8, 30, masked=dropped, dtype=torch.float32, seed=3)
    if name == "jsd":
        k.fused_linear_jsd(**pair)
    else:
        k.fused_linear_cross_entropy(*student(pair))
    (rows,) = kept
    counted = (pair["shift_labels"] != -100).nonzero().flatten().tolist()
    assert len(counted) == TOKENS - dropped
    assert rows is None if dropped == 0 else rows.tolist() == counted
