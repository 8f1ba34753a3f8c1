"""Context distillation: the teacher's samples as targets under the student's prompt."""

from dataclasses import replace

import pytest
import torch

from opsd_train.rollout import Request, Sampling
from opsd_train.rollout.transformers_engine import TransformersEngine
from tests.helpers.method_cases import (
    assert_same,
    change,
    double,
    make_method,
    make_policy,
    make_samples,
    run,
    settings,
    truth,
)
from tests.helpers.tiny import make_tokenizer

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


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_it_draws_from_the_untrained_model_under_the_teachers_prompt(lora: bool) -> None:
    policy = make_policy(lora, trained=False)
    method = make_method(CONFIG, policy)
    assert method.source(CONFIG) == "teacher" and method.teacher_prompt(CONFIG)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|end|>"
    engine = TransformersEngine(policy, tokenizer, CONFIG.rollout)
    asked = [Request(sample.teacher_prompt, seed) for seed, sample in enumerate(make_samples())]
    untrained = engine.generate(asked, Sampling(12, temperature=1.0))
    for seed in (1, 2):
        change(policy, seed, std=0.3)
        kept = [parameter.detach().clone() for parameter in policy.parameters]
        assert engine.generate(asked, Sampling(12, temperature=1.0)) != untrained
        with method.sampling():
            assert engine.generate(asked, Sampling(12, temperature=1.0)) == untrained
        assert all(map(torch.equal, policy.parameters, kept))


def test_a_resumed_run_draws_from_the_untrained_model_too() -> None:
    policy = make_policy(lora=False)
    start = [parameter.detach().clone() for parameter in policy.parameters]
    method = make_method(CONFIG, policy)
    change(policy, 11)
    later = make_method(CONFIG, policy)  # of weights that are trained already
    for name, tensor in later.state().items():
        tensor.copy_(method.state()[name])
    with later.sampling():
        assert all(map(torch.equal, policy.parameters, start))
