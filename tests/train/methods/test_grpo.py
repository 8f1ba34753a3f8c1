"""GRPO: advantages by hand, the surrogate token by token, gradients against full logits."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from opsd_train.config.method_schema import GrpoConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.grpo import FixedLogprobs, surrogate
from tests.helpers.method_cases import (
    AHEAD,
    GRPO,
    assert_same,
    change,
    chosen,
    counted,
    double,
    finish,
    log_probs,
    make_method,
    make_policy,
    make_samples,
    run,
    settings,
    truth,
)

ALL = (*GRPO, "grpo.mask_truncated=false")


def answered(pattern: str, finished: str | None = None) -> list[Sample]:
    """Samples that are right where the pattern has a 1, cut off where `finished` has a 0."""
    finished = finished or "1" * len(pattern)
    return [
        replace(sample, correct=right == "1", finished=done == "1")
        for sample, right, done in zip(make_samples(len(pattern)), pattern, finished, strict=True)
    ]


def weighed(pattern: str, *overrides: str, finished: str | None = None) -> list[Sample]:
    method = make_method(settings(*GRPO, *overrides), make_policy())
    return method.assign_weights(answered(pattern, finished))


# ------------------------------------------------------------------------------ weights, advantages


def test_advantages_by_hand() -> None:
    found = weighed("1000" + "1101")
    std = statistics.stdev([1, 0, 0, 0])  # n - 1, as torch and TRL
    assert std == pytest.approx(0.5)
    wanted = [0.75 / std] + [-0.25 / std] * 3 + [0.25 / std] * 2 + [-0.75 / std] + [0.25 / std]
    assert [s.advantage for s in found] == pytest.approx(wanted)
    assert [s.weight for s in found] == [1.0] * 8
    assert [replace(s, advantage=0.0) for s in found] == answered("10001101")


def test_advantages_without_the_standard_deviation() -> None:
    found = weighed("1000" + "1101", "grpo.normalise_std=false")
    assert [s.advantage for s in found] == [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25]


def test_groups_without_variance_do_not_count() -> None:
    found = weighed("1111" + "0000" + "0100")
    assert [s.weight for s in found] == [0.0] * 8 + [1.0] * 4
    assert counted(found) == sum(len(s.completion) for s in found[8:])
    method = make_method(settings(*GRPO), make_policy())
    assert method.extra_metrics(found) == {"groups_dropped": pytest.approx(2 / 3)}


def test_cut_off_samples_count_in_their_group_but_not_in_the_loss() -> None:
    finished = "1101"
    found = weighed("1000", finished=finished)
    assert [s.weight for s in found] == [1, 1, 0, 1]
    assert [s.advantage for s in found] == pytest.approx([1.5, -0.5, -0.5, -0.5])
    every = weighed("1000", "grpo.mask_truncated=false", finished=finished)
    assert [s.weight for s in every] == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------ whole method


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("with_kl", [False, True], ids=["no KL", "KL"])
def test_loss_and_gradient_equal_full_logits(with_kl: bool, lora: bool) -> None:
    """In the second of two updates: the old and the initial policy differ from the current one."""
    overrides = ["updates_per_step=2", "grpo.kl_weight=0.3" if with_kl else "grpo.kl_weight=0.0"]
    config, policy = settings(*GRPO, *overrides), make_policy(lora)
    method, initial = make_method(config, policy), double(policy)
    change(policy, 11)
    samples = method.assign_weights(make_samples())
    assert method.config.updates_per_step == 2 and {s.weight for s in samples} == {0, 1}
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    precomputed = method.precompute([samples])
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} is not what it was"
    old = double(policy)
    change(policy, 12, std=0.04)
    method.after_step()
    found = finish(method, [samples], precomputed, counted(samples))
    its = None if lora else initial  # with adapters: the model without them
    wanted = truth(config, double(policy), samples, teacher=its, old=old)
    assert_same(found, wanted)
    assert found.stats["clipped"].sum() > 0 and (found.stats["ratio"] - 1).abs().max() > 0.3
    assert ("kl" in found.stats) == with_kl


def test_the_first_update_needs_no_old_policy() -> None:
    config, policy = settings(*ALL, "updates_per_step=1"), make_policy()
    method = make_method(config, policy)
    samples = method.assign_weights(make_samples())
    assert method.precompute([samples]) == [FixedLogprobs(None, None)]
    found = run(method, samples)
    assert_same(found, truth(config, double(policy), samples))
    assert (found.stats["ratio"] == 1).all() and (found.stats["clipped"] == 0).all()


def test_statistics_are_those_of_the_sampled_distribution() -> None:
    config, policy = settings(*ALL, "grpo.kl_weight=0.3", "grpo.importance_cap=1.5"), make_policy()
    method = make_method(config, policy)
    samples = method.assign_weights(make_samples())
    found = finish(method, [samples], method.precompute([samples]), counted(samples))
    assert method.temperature == config.rollout.temperature == 1.2
    model, wanted = double(policy), {"logprob": [], "entropy": [], "importance": [], "kl": []}
    for sample in samples:
        with torch.no_grad():
            own = log_probs(model, sample.student_prompt, sample.completion, 1.2)
            with model.disable_adapter():
                base = log_probs(model, sample.student_prompt, sample.completion, 1.2)
        logprob, initial = chosen(own, sample.completion), chosen(base, sample.completion)
        wanted["logprob"].append(logprob)
        wanted["entropy"].append(-(own.exp() * own).sum(-1))
        sampler = torch.tensor(sample.logprobs, dtype=torch.float64)
        wanted["importance"].append((logprob - sampler).exp().clamp(max=1.5))
        wanted["kl"].append((initial - logprob).exp() - (initial - logprob) - 1)
    for name, parts in wanted.items():
        truth_of_it = torch.cat(parts)
        torch.testing.assert_close(found.stats[name].double(), truth_of_it, rtol=1e-3, atol=1e-4)
    assert 0 < (found.stats["importance"] == 1.5).sum() < len(found.stats["importance"])


def test_samples_of_older_weights_are_weighted() -> None:
    """With one update a step; the ratio of the surrogate is 1, the weight is not."""
    config, policy, samples = settings(*ALL, *AHEAD), make_policy(), []
    for sample in make_samples():
        own = log_probs(double(policy), sample.student_prompt, sample.completion, 1.2)
        samples.append(replace(sample, logprobs=chosen(own, sample.completion).tolist()))
    change(policy, 11, std=0.05)
    method, model = make_method(config, policy), double(policy)
    samples = method.assign_weights(samples)
    found = run(method, samples)
    assert_same(found, truth(config, model, samples))
    weights = found.stats["importance"]
    assert (weights == 2).sum() > 2 and (weights < 0.7).sum() > 2
    assert (found.stats["ratio"] == 1).all()
    dropped = truth(settings(*ALL, "grpo.importance_cap=null"), model, samples)
    for name, grad in found.grads.items():
        assert (grad - dropped.grads[name]).abs().max() > 0.1 * grad.abs().max(), name


def test_it_reads_the_students_samples() -> None:
    config = settings(*GRPO)
    method = make_method(config, make_policy())
    assert method.source(config) == "student" and not method.teacher_prompt(config)


# ----------------------------------------------------------------------------------- the surrogate


def tokens(count: int, **fields) -> Sample:
    sample = replace(make_samples()[0], completion=[1] * count, logprobs=[-1.0] * count)
    return replace(sample, **fields)


def surrogate_of(
    logprob: list[float], old: list[float], samples: list[Sample], reference=None, **grpo
) -> tuple[float, list[float], dict]:
    """Loss, gradient and statistics with a divisor of 4."""
    leaf = torch.tensor(logprob, dtype=torch.float64, requires_grad=True)
    past = torch.tensor(old, dtype=torch.float64)
    initial = None if reference is None else torch.tensor(reference, dtype=torch.float64)
    given = FixedLogprobs(past, initial)
    loss, stats = surrogate(leaf, samples, given, GrpoConfig(**grpo), 4)
    loss.backward()
    return loss.item(), leaf.grad.tolist(), stats


def test_the_clip_on_both_sides() -> None:
    """Bounds 0.9 and 1.5. A ratio stops where it went far enough in the advantage's direction."""
    ratios = [2.0, 0.5, 1.4, 0.95]
    logprob = [math.log(ratio) - 1 for ratio in ratios]
    bounds = {"clip_low": 0.1, "clip_high": 0.5, "importance_cap": None}
    up, down = tokens(4, advantage=2.0), tokens(4, advantage=-2.0)
    loss, grad, stats = surrogate_of(logprob, [-1.0] * 4, [up], **bounds)
    assert loss == pytest.approx(-2 * (1.5 + 0.5 + 1.4 + 0.95) / 4)
    assert grad == pytest.approx([0, -2 * 0.5 / 4, -2 * 1.4 / 4, -2 * 0.95 / 4])
    assert stats["clipped"].tolist() == [1, 0, 0, 0]
    assert stats["ratio"].tolist() == pytest.approx(ratios)
    loss, grad, stats = surrogate_of(logprob, [-1.0] * 4, [down], **bounds)
    assert loss == pytest.approx(2 * (2.0 + 0.9 + 1.4 + 0.95) / 4)
    assert grad == pytest.approx([2 * 2.0 / 4, 0, 2 * 1.4 / 4, 2 * 0.95 / 4])
    assert stats["clipped"].tolist() == [0, 1, 0, 0]


def test_the_importance_weight_is_capped_and_constant() -> None:
    """The weight compares the old policy with the sampler; the current policy does not enter."""
    sample = tokens(4, advantage=1.0, logprobs=[-1.0, -2.0, -3.0, -1.0])
    old = [-1.0, -1.0, -1.0, -3.0]  # weights 1, e, e^2 and e^-2
    logprob = [value + 0.1 for value in old]
    weights = [1.0, 2.0, 2.0, math.exp(-2)]
    loss, grad, stats = surrogate_of(logprob, old, [sample], importance_cap=2.0)
    assert stats["importance"].tolist() == pytest.approx(weights)
    assert loss == pytest.approx(-math.exp(0.1) * sum(weights) / 4)
    assert grad == pytest.approx([-math.exp(0.1) * weight / 4 for weight in weights])


def test_k3_is_neither_clipped_nor_reweighted() -> None:
    sample = tokens(2, advantage=0.0, logprobs=[-5.0, -5.0])
    loss, grad, stats = surrogate_of(
        [-1.0, -2.0], [-1.0, -2.0], [sample], reference=[-1.5, -1.0], kl_weight=0.5
    )
    gaps = [-0.5, 1.0]
    k3 = [math.exp(gap) - gap - 1 for gap in gaps]
    assert stats["kl"].tolist() == pytest.approx(k3)
    assert loss == pytest.approx(0.5 * sum(k3) / 4)
    assert grad == pytest.approx([0.5 * (1 - math.exp(gap)) / 4 for gap in gaps])


def test_samples_of_weight_zero_add_nothing() -> None:
    one, other = tokens(2, advantage=1.0), tokens(2, advantage=3.0, weight=0.0)
    loss, grad, _ = surrogate_of(
        [-1.0] * 4, [-1.0] * 4, [one, other], reference=[-3.0] * 4, kl_weight=0.0
    )
    assert loss == pytest.approx(-2 / 4) and grad == pytest.approx([-1 / 4, -1 / 4, 0, 0])
