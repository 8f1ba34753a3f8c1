"""Checks that hold for every method: micro-batches, idle ranks, memory, rounding."""

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels.backends import blocked_torch, cpp_backend
from opsd_kernels.testing import assert_close
from opsd_train.data.batches import balanced_micro_batches, micro_batches
from opsd_train.distributed.context import DistributedContext
from opsd_train.methods import METHODS
from opsd_train.methods import common as losses
from tests.helpers import devices
from tests.helpers.method_cases import (
    CASES,
    TERMS,
    Outcome,
    assert_same,
    change,
    counted,
    double,
    finish,
    grads_of,
    make_method,
    make_policy,
    make_samples,
    make_teacher,
    plain_loss,
    run,
    settings,
    truth,
)

planning = importlib.import_module("opsd_kernels.plan")  # the package's `plan` is the function

ALL = CASES | TERMS
FEW = ("opsd and policy gradient", "opsd credit", "opsd early", "distill long term")
REST = [pytest.param(n, marks=pytest.mark.exhaustive) for n in TERMS if n not in FEW]
EVERY = pytest.mark.parametrize("name", [*CASES, *FEW, *REST])
LORA = pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])


def test_every_method_is_here() -> None:
    assert {settings(*overrides).method for overrides in CASES.values()} == set(METHODS)


@EVERY
def test_one_micro_batch_or_many(name: str) -> None:
    method = make_method(settings(*ALL[name]), make_policy())
    samples = [sample for sample in method.assign_weights(make_samples()) if sample.weight > 0]
    longest = max(sample.longest for sample in samples)
    assert len(list(micro_batches(samples, longest))) >= 3
    assert_same(run(method, samples, budget=longest), run(method, samples), rel=1e-5)


@EVERY
def test_precompute_leaves_no_trace(name: str) -> None:
    """Weights and gradients stay the same, bit for bit."""
    policy = make_policy(lora=False)
    method = make_method(settings(*ALL[name]), policy)
    change(policy, 3)
    method.after_step()
    samples = method.assign_weights(make_samples())
    wanted = run(method, samples).grads
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    method.precompute([samples])
    for parameter, (key, value) in zip(policy.model.parameters(), before.items(), strict=True):
        assert torch.equal(parameter, value) and parameter.requires_grad
        assert torch.equal(parameter.grad.cpu(), wanted[key])


class OtherHasOne(DistributedContext):
    """Another rank has one micro-batch."""

    def max(self, value: float) -> float:
        return max(value, 1)


@LORA
@EVERY
def test_idle_micro_batch(name: str, lora: bool) -> None:
    """A rank without loss tokens runs a backward pass too; it gives no gradient."""
    policy = make_policy(lora)
    method = make_method(settings(*ALL[name]), policy)
    change(policy, 3)
    samples = method.assign_weights(make_samples())
    groups = balanced_micro_batches(samples, [], 10**6, OtherHasOne(policy.device, size=2))
    assert counted(groups[0]) == 0 and len(groups) == 1
    found = finish(method, groups, method.precompute(groups), num_tokens=7)
    assert found.loss == 0
    assert len(found.grads) == len(policy.parameters)
    assert all((grad == 0).all() for grad in found.grads.values())


# ------------------------------------------------------------------------------------------- memory

VOCAB, WORKSPACE = 8192, 2 << 20


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.fixture
def largest(monkeypatch) -> Iterator[Largest]:
    """Also inside the registered operators, which dispatch modes do not enter."""
    seen = Largest()

    def watched(whole: Callable, *args: object, **options: object) -> object:
        with seen:
            return whole(*args, **options)

    modules = [blocked_torch, cpp_backend]
    if devices.CHOICE == "cuda":
        modules.append(importlib.import_module("opsd_kernels.backends.triton_backend"))
    for module in modules:
        for name in ("divergence", "logprob", "topk"):
            monkeypatch.setattr(module, name, functools.partial(watched, getattr(module, name)))
    monkeypatch.setattr(planning, "default_workspace", lambda device: WORKSPACE)
    monkeypatch.setattr(losses, "workspace_bytes", lambda device, trained: None)
    return seen


def long_samples(method) -> list:
    samples = method.assign_weights(
        [replace(sample, completion=[7] * 80, logprobs=[-4.0] * 80) for sample in make_samples(4)]
    )
    return [sample for sample in samples if sample.weight > 0]


@LORA
@EVERY
def test_no_tensor_has_the_size_of_the_logits(name: str, lora: bool, largest: Largest) -> None:
    policy, teacher = make_policy(lora, vocab_size=VOCAB), make_teacher(vocab_size=VOCAB)
    method = make_method(settings(*ALL[name]), policy, teacher)
    samples = long_samples(method)
    with largest:
        run(method, samples)
    tokens = counted(samples)
    assert tokens >= 160 and WORKSPACE < tokens * VOCAB * 4 / 2
    assert VOCAB * 32 <= largest.elements < tokens * VOCAB / 2


def test_a_block_of_logits_inside_an_operator_would_be_seen(largest: Largest, monkeypatch) -> None:
    monkeypatch.setattr(planning, "default_workspace", lambda device: 1 << 30)
    method = make_method(settings(*CASES["opsd JSD"]), make_policy(vocab_size=VOCAB))
    samples = long_samples(method)
    with largest:
        run(method, samples)
    assert largest.elements >= counted(samples) * VOCAB


def test_full_logits_would_be_seen(largest: Largest) -> None:
    config, policy = settings("method=sft"), make_policy(vocab_size=VOCAB)
    method = make_method(config, policy)
    samples = long_samples(method)

    def plain(hidden, head, targets):
        return torch.nn.functional.cross_entropy(hidden @ head.weight.T, targets)

    pairs = [s.student_prompt for s in samples], [s.completion for s in samples]
    with largest:
        policy.run(*pairs, plain).backward()
    assert largest.elements >= counted(samples) * VOCAB


# ----------------------------------------------------------------------------------------- bfloat16


def flat(outcome: Outcome, like: Outcome) -> Tensor:
    """All gradients in one row, each tensor relative to its size in `like`."""
    parts = [
        (outcome.grads[name].double() / like.grads[name].abs().max()).flatten()
        for name in like.grads
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("star", "context_distill")])
def test_bfloat16_rounds_no_more_than_plain_pytorch(name: str) -> None:
    """fp32 adapters under autocast, against the same formula run by PyTorch alone."""
    config = settings(*CASES[name])
    policy, teacher = make_policy(dtype=torch.bfloat16), make_teacher(torch.bfloat16)
    method = make_method(config, policy, teacher)
    samples = [s for s in method.assign_weights(make_samples()) if s.weight > 0]
    its = teacher if config.method == "distill" else None
    exact = truth(config, double(policy), samples, teacher=its and double(its))
    found = run(method, samples)
    with torch.autocast("cpu", torch.bfloat16):
        model, other = (p and copy.deepcopy(p.model).cpu() for p in (policy, its))
        model.zero_grad()
        loss = plain_loss(config, model, samples, teacher=other)
    loss.backward()
    plain = Outcome(loss.item(), {}, grads_of(model))
    assert_close(flat(found, exact), flat(exact, exact), flat(plain, exact), name=name)
