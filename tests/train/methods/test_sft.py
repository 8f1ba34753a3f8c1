"""SFT: cross-entropy of the reference solutions under the student's prompt."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from opsd_train.model.policy import Policy
from tests.helpers.method_cases import (
    PAD,
    assert_same,
    double,
    log_probs,
    make_method,
    make_policy,
    make_samples,
    reweighted,
    run,
    settings,
    truth,
)

POLICIES = pytest.mark.parametrize(
    "policy",
    [{}, {"lora": False}, {"lora": False, "tied": False}],
    ids=["lora", "all weights", "all weights, head of its own"],
)


@POLICIES
def test_loss_and_gradient_equal_full_logits(policy: dict) -> None:
    config, policy, samples = settings("method=sft"), make_policy(**policy), make_samples()
    found = run(make_method(config, policy), samples)
    assert_same(found, truth(config, double(policy), samples))


SIZES = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
}


def gemma() -> Gemma2ForCausalLM:
    """Its logits are c tanh(z / c); a small c bends them all."""
    return Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=2.0, **SIZES))


def phi() -> PhiForCausalLM:
    """Its head has a bias."""
    model = PhiForCausalLM(PhiConfig(**SIZES))
    model.lm_head.bias.data.normal_()
    return model


@pytest.mark.parametrize("make", [gemma, phi])
def test_heads_with_a_softcap_or_a_bias(make) -> None:
    torch.manual_seed(0)
    config, policy, samples = (
        settings("method=sft"),
        Policy(make(), PAD, torch.float32),
        make_samples(),
    )
    found = run(make_method(config, policy), samples)
    assert_same(found, truth(config, double(policy), samples))


def test_weights_scale_a_sample_and_zero_leaves_it_out() -> None:
    config, policy = settings("method=sft"), make_policy()
    samples = reweighted(make_samples(), [1, 0, 2.5, 0, 1, 1, 0.5, 1])
    found = run(make_method(config, policy), samples)
    assert_same(found, truth(config, double(policy), samples))


def test_statistics_are_those_of_the_tokens() -> None:
    policy, samples = make_policy(), make_samples()
    found = run(make_method(settings("method=sft"), policy), samples)
    ordered = sorted(samples, key=lambda sample: sample.longest)
    model = double(policy)
    with torch.no_grad():
        read = [log_probs(model, s.student_prompt, s.completion) for s in ordered]
    entropy = torch.cat([-(lp.exp() * lp).sum(-1) for lp in read])
    logprob = torch.cat(
        [lp[range(len(s.completion)), s.completion] for lp, s in zip(read, ordered, strict=True)]
    )
    torch.testing.assert_close(found.stats["entropy"].double(), entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.stats["logprob"].double(), logprob, rtol=1e-4, atol=1e-4)


def test_it_reads_solutions() -> None:
    config = settings("method=sft")
    method = make_method(config, make_policy())
    assert method.source(config) == "solution" and not method.teacher_prompt(config)
