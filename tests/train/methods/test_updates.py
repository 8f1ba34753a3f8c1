"""The second of two updates on one rollout: what stays as it was before the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.model.policy import Policy
from tests.helpers.method_cases import (
    Outcome,
    assert_same,
    change,
    chosen,
    counted,
    double,
    finish,
    grads_of,
    log_probs,
    make_method,
    make_policy,
    make_samples,
    make_teacher,
    recipe_settings,
    settings,
)


@dataclass
class Second:
    """A second update: the model before the first and now, in fp64, and what the method found."""

    before: nn.Module
    model: nn.Module
    found: Outcome
    samples: list[Sample]

    def assert_is(self, value: Callable[[Sample], Tensor]) -> None:
        """Loss and gradient are those of the mean of `value`, (T,) per sample."""
        self.model.zero_grad()
        loss = sum(value(sample).sum() for sample in self.samples) / counted(self.samples)
        loss.backward()
        assert_same(self.found, Outcome(loss.item(), {}, grads_of(self.model)))


def second_update(config: Config, policy: Policy) -> Second:
    method, samples = make_method(config, policy), make_samples()
    precomputed, before = method.precompute([samples]), double(policy)
    change(policy, 12, std=0.04)
    found = finish(method, [samples], precomputed, counted(samples))
    return Second(before, double(policy), found, samples)


def test_a_sampled_token_has_a_clipped_ratio() -> None:
    """The formula of demo/opsd-sampled-updates."""
    second = second_update(recipe_settings("opsd-sampled-updates"), make_policy())

    def value(sample: Sample) -> Tensor:
        y, student = sample.completion, sample.student_prompt
        with torch.no_grad():
            before = chosen(log_probs(second.before, student, y), y)
            with second.before.disable_adapter():
                advantage = chosen(log_probs(second.before, sample.teacher_prompt, y), y) - before
        ratio = (chosen(log_probs(second.model, student, y), y) - before).exp()
        q = torch.tensor(sample.logprobs, dtype=torch.double)
        clipped = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return clipped * (before - q).exp().clamp(max=2.0)

    second.assert_is(value)
    stats = second.found.stats
    assert stats["clipped"].sum() > 3 and (stats["ratio"] - 1).abs().max() > 0.3
    assert (stats["importance"] == 2).sum() >= 2


@pytest.mark.parametrize("teacher", ["current", "resync"])
def test_a_trained_head_is_that_of_the_teachers_pass(teacher: str) -> None:
    more = "updates_per_step=2", f"opsd.teacher={teacher}"
    policy = make_policy(lora=False, tied=False)
    second = second_update(recipe_settings("opsd-reference-free", *more), policy)

    def value(sample: Sample) -> Tensor:
        with torch.no_grad():
            lt = log_probs(second.before, sample.teacher_prompt, sample.completion)
        ls = log_probs(second.model, sample.student_prompt, sample.completion)
        return (lt.exp() * (lt - ls)).sum(-1)

    second.assert_is(value)


def test_a_ratio_begins_at_one_where_heads_are_padded_differently() -> None:
    more = ("method=distill", "distill.teacher=t", "updates_per_step=2")
    config = settings(*more, "loss.objective=sampled_token")
    policy, teacher = make_policy(vocab_size=288), make_teacher(vocab_size=261)
    method, samples = make_method(config, policy, teacher), make_samples()
    ratio = finish(method, [samples], method.precompute([samples]), counted(samples)).stats["ratio"]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


def test_updates_of_several_teachers_terms() -> None:
    """With a policy gradient beside it a divergence needs the old policy, and no more."""
    more = ("updates_per_step=2", "grpo={}", "rollout.samples_per_prompt=4")
    config, policy = recipe_settings("opsd-skip-first", *more), make_policy()
    method = make_method(config, policy)
    (fixed,) = method.precompute([make_samples()])
    assert fixed.old is not None and fixed.advantage is None and fixed.ref is None
    (alone,) = make_method(recipe_settings("opsd-skip-first", more[0]), policy).precompute(
        [make_samples()]
    )
    assert alone.old is None
