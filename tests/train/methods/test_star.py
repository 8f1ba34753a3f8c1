"""STaR: cross-entropy of the correct samples, and nothing else."""

from dataclasses import replace

import pytest

from tests.helpers.method_cases import (
    assert_same,
    counted,
    double,
    make_method,
    make_policy,
    make_samples,
    run,
    settings,
    truth,
)

CONFIG = settings("method=star")


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_only_correct_samples_are_learnt(lora: bool) -> None:
    policy, samples = make_policy(lora), make_samples()
    method = make_method(CONFIG, policy)
    weighed = method.assign_weights(samples)
    assert [sample.weight for sample in weighed] == [1, 0, 0, 1, 1, 0, 0, 1]
    assert [replace(sample, weight=1.0) for sample in weighed] == samples
    kept = [sample for sample in samples if sample.correct]
    assert counted(weighed) == counted(kept) < counted(samples)
    wanted = truth(CONFIG, double(policy), kept)
    assert_same(run(method, weighed), wanted)
    assert_same(run(method, kept), wanted)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_all_wrong_gives_no_gradient_at_all(lora: bool) -> None:
    samples = [replace(sample, correct=False) for sample in make_samples()]
    method = make_method(CONFIG, make_policy(lora))
    weighed = method.assign_weights(samples)
    assert counted(weighed) == 0
    found = run(method, weighed, num_tokens=1)
    assert found.loss == 0
    assert len(found.grads) == len(method.policy.parameters)
    assert all((grad == 0).all() for grad in found.grads.values())


def test_it_reads_the_students_samples() -> None:
    method = make_method(CONFIG, make_policy())
    assert method.source(CONFIG) == "student" and not method.teacher_prompt(CONFIG)
