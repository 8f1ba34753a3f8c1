"""Samples of one prompt that share its tokens: losses and gradients are those of each alone."""

import itertools
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from opsd_train.data import layout as layouts
from opsd_train.data.batches import Sample, micro_batches
from opsd_train.data.layout import PADDED
from opsd_train.model.adapters import add_adapters
from opsd_train.model.families import batch_layout
from opsd_train.model.policy import Policy
from tests.helpers import devices
from tests.helpers.family_models import FAMILIES, SIZES
from tests.helpers.method_cases import (
    CASES,
    GRPO,
    LORA,
    VOCAB,
    Outcome,
    assert_same,
    change,
    chosen,
    counted,
    double,
    finish,
    log_probs,
    make_method,
    make_samples,
    settings,
    truth,
)

# Two updates: the old and the initial policy have forward passes of their own.
WHOLE = (*GRPO, "updates_per_step=2", "grpo.kl_weight=0.3")
# The first of each group has the longest prompt or the shortest; 8 alone is paper/grpo's size.
GROUPS = (4, 1, 3)
EVERY_SIZE = tuple(range(1, 9))
WINDOW = {"gemma3_text": {"sliding_window": 40}, "gemma2": {"sliding_window": 40}}


def make_policy(family: str, lora: bool, checkpointing: bool) -> Policy:
    torch.manual_seed(3)
    sizes = SIZES | FAMILIES[family] | WINDOW.get(family, {}) | {"vocab_size": VOCAB}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layout = batch_layout(model, 0)
    assert layout.kind == "shared"
    model = add_adapters(model, LORA) if lora else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # Hidden sizes of a test are too small for sharing to save time.
    policy = Policy(model.to(devices.NAME), 0, torch.float32, replace(layout, hidden_size=10**4))
    change(policy, seed=1, std=0.1)
    policy.model.train()
    return policy


def make_groups(sizes: tuple[int, ...]) -> list[Sample]:
    """Groups of so many samples, with advantages of both signs."""
    made = iter(make_samples(sum(sizes)))
    groups = [list(itertools.islice(made, size)) for size in sizes]
    return [
        replace(sample, student_prompt=group[0].student_prompt, advantage=0.5 + 0.4 * number)
        if number % 2
        else replace(sample, student_prompt=group[0].student_prompt, advantage=-0.7)
        for group in groups
        for number, sample in enumerate(group)
    ]


def compare(family: str, lora: bool, checkpointing: bool, sizes: tuple[int, ...], budget: int):
    """GRPO's second update against full logits of each sample alone, in fp64."""
    config, policy = settings(*WHOLE), make_policy(family, lora, checkpointing)
    method, initial = make_method(config, policy), double(policy)
    change(policy, 11)
    old, samples = double(policy), make_groups(sizes)
    groups = list(micro_batches(samples, budget, policy.layout))
    assert any(len(group) > len(policy.layout.runs(*texts(group))) for group in groups)
    policy.model.eval()
    precomputed = method.precompute(groups)
    change(policy, 12)
    policy.model.train()
    found = finish(method, groups, precomputed, counted(samples))
    model = double(policy)
    assert_same(found, truth(config, model, samples, teacher=None if lora else initial, old=old))
    with torch.no_grad():
        wanted = torch.cat([logprob(old, sample) for group in groups for sample in group])
    assert (found.stats["logprob"].double() - wanted).abs().max() < 1e-4 * wanted.abs().max()
    return groups, policy


def texts(samples: list[Sample]) -> tuple[list, list]:
    return [s.student_prompt for s in samples], [s.completion for s in samples]


def logprob(model: torch.nn.Module, sample: Sample) -> Tensor:
    return chosen(
        log_probs(model, sample.student_prompt, sample.completion, 1.2), sample.completion
    )


@pytest.mark.parametrize(
    "family, lora, checkpointing",
    [
        ("llama", True, True),
        ("llama", False, False),
        ("qwen3", True, False),
        ("gemma", False, True),
        ("gemma2", True, False),  # eager attention, which adds its mask
    ],
)
def test_grpo_is_that_of_each_sample_alone(family: str, lora: bool, checkpointing: bool) -> None:
    groups, _ = compare(family, lora, checkpointing, GROUPS, budget=40)
    assert len(groups) >= 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes, budget", [((8,), 10**6), (EVERY_SIZE, 10**6), (EVERY_SIZE, 45)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_all_of_it(
    family: str, lora: bool, checkpointing: bool, sizes: tuple[int, ...], budget: int
) -> None:
    groups, _ = compare(family, lora, checkpointing, sizes, budget)
    split = sum(len({s.problem.id for s in group}) for group in groups)
    assert len(groups) == 1 if budget == 10**6 else split >= 8


class Read:
    """The number of tokens that the model reads."""

    def __init__(self, policy: Policy) -> None:
        self.tokens: list[int] = []
        policy.core.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _module, _positional, given: dict) -> None:
        self.tokens.append(given["input_ids"].numel())


def test_a_prompt_is_read_once_by_each_policy() -> None:
    """The student, the old policy and the reference policy; with a cut group once in each part."""
    policy = make_policy("llama", lora=True, checkpointing=False)
    method, samples = make_method(settings(*WHOLE), policy), make_groups((8,))
    read, prompt = Read(policy), len(samples[0].student_prompt)
    finish(method, [samples], method.precompute([samples]), counted(samples))
    assert read.tokens == [prompt + counted(samples)] * 3
    read.tokens.clear()
    cut = [samples[:3], samples[3:]]
    finish(method, cut, method.precompute(cut), counted(samples))
    assert sum(read.tokens) == 3 * (2 * prompt + counted(samples))


def outcome(policy: Policy, name: str = "grpo") -> Outcome:
    method, samples = make_method(settings(*CASES[name]), policy), make_groups((4, 4))
    groups = [samples]
    return finish(method, groups, method.precompute(groups), counted(samples))


@pytest.mark.parametrize("name", ["star", "distill", "opsd JSD"])
def test_other_methods_share_too(name: str) -> None:
    policy = make_policy("llama", lora=True, checkpointing=False)
    read = Read(policy)
    shared = outcome(policy, name)
    tokens = sum(read.tokens)
    policy.layout = PADDED
    assert_same(shared, outcome(policy, name), rel=1e-4)
    assert tokens < sum(read.tokens) - tokens


@pytest.mark.parametrize(
    "mask",
    [
        lambda parts: parts.new_ones(*parts.shape, parts.shape[1]).tril().bool()[:, None],
        lambda parts: (parts[:, :, None] == parts[:, None, :]).tril()[:, None],
    ],
    ids=["it reads the completions before", "it does not read the prompt"],
)
def test_another_mask_would_be_seen(mask, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama", lora=True, checkpointing=False)
    wanted = outcome(policy)
    monkeypatch.setattr(layouts, "_mask", mask)
    with pytest.raises(AssertionError):
        assert_same(outcome(policy), wanted)


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_another_gradient_of_the_prompt_would_be_seen(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient from the completions to the prompt's keys and values, and from there on."""
    policy = make_policy("llama", lora=False, checkpointing=False)
    wanted = outcome(policy)
    prompt = len(make_groups((4, 4))[0].student_prompt)
    policy.core.model.layers[0].register_forward_hook(
        lambda _module, _given, hidden: torch.cat(
            [scaled(hidden[:, : prompt - 1], factor), hidden[:, prompt - 1 :]], dim=1
        )
    )
    with pytest.raises(AssertionError):
        assert_same(outcome(policy), wanted)


def scaled(hidden: Tensor, factor: float) -> Tensor:
    """The same values with `factor` times the gradient."""
    return factor * hidden + (1 - factor) * hidden.detach()
