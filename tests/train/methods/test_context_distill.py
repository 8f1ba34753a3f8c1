"""Context distillation: the teacher's samples as targets under the student's prompt."""

from dataclasses import replace

import pytest

from tests.helpers.method_cases import (
    assert_same,
    double,
    make_method,
    make_policy,
    make_samples,
    run,
    settings,
    truth,
)

CONFIG = settings("method=context_distill")


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_loss_and_gradient_equal_full_logits(lora: bool) -> None:
    policy, samples = make_policy(lora), make_samples()
    found = run(make_method(CONFIG, policy), samples)
    assert_same(found, truth(CONFIG, double(policy), samples))


def test_the_privileged_prompt_is_not_read_in_the_loss() -> None:
    policy, samples = make_policy(), make_samples()
    method = make_method(CONFIG, policy)
    without = [replace(sample, teacher_prompt=None) for sample in samples]
    assert method.assign_weights(samples) == samples
    assert_same(run(method, samples), run(method, without), rel=1e-5)


def test_it_draws_from_the_teacher() -> None:
    method = make_method(CONFIG, make_policy())
    assert method.source(CONFIG) == "teacher" and method.teacher_prompt(CONFIG)
