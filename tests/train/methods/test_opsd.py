"""OPSD: every objective and teacher against its formula over full logits."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.helpers.method_cases import (
    AHEAD,
    CASES,
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

OBJECTIVES = [name for name in CASES if name.startswith("opsd")]
POLICIES = pytest.mark.parametrize(
    "policy",
    [{}, {"lora": False}, {"lora": False, "tied": False}],
    ids=["lora", "all weights", "all weights, head of its own"],
)
DECAY = 0.8
# The shares of the weights at the start and after each of two updates in the teacher's.
SHARES = {
    "initial": (1.0, 0.0, 0.0),
    "ema": (DECAY**2, DECAY * (1 - DECAY), 1 - DECAY),
    "current": (0.0, 0.0, 1.0),
    "resync": (0.0, 1.0, 0.0),
}
SETTINGS = {"ema": [f"opsd.ema_decay={DECAY}"], "resync": ["opsd.resync_every=3"]}


def average(models: list[torch.nn.Module], shares: tuple[float, ...]) -> torch.nn.Module:
    """A model whose weights are a weighted sum of theirs."""
    made = copy.deepcopy(models[0])
    every = zip(*(model.parameters() for model in models), strict=True)
    for parameter, values in zip(made.parameters(), every, strict=True):
        parameter.data = sum(share * v.data for share, v in zip(shares, values, strict=True))
    return made


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_equal_full_logits(name: str) -> None:
    config, policy, samples = settings(*CASES[name]), make_policy(), make_samples()
    found = run(make_method(config, policy), samples)
    assert len(found.grads) == 12 and all("lora_" in weight for weight in found.grads)
    assert_same(found, truth(config, double(policy), samples))


@POLICIES
@pytest.mark.parametrize("teacher", SHARES)
def test_teachers_after_two_updates(teacher: str, policy: dict) -> None:
    config = settings(*CASES["opsd JSD"], f"opsd.teacher={teacher}", *SETTINGS.get(teacher, []))
    policy, samples = make_policy(**policy), make_samples()
    method = make_method(config, policy)
    history = [double(policy)]
    method.precompute([samples])  # nothing cached of this teacher may serve for the later one
    for seed, method.step in ((11, 3), (12, 4)):  # after step 3 a copy is made again
        change(policy, seed)
        method.after_step()
        history.append(double(policy))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    found = run(method, samples)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} is not what it was"
    adapters_off = policy.has_adapters and teacher == "initial"
    its = None if adapters_off else average(history, SHARES[teacher])
    assert_same(found, truth(config, history[-1], samples, teacher=its))


def test_sampled_token_with_a_trained_head() -> None:
    config, samples = settings(*CASES["opsd sampled token"]), make_samples()
    policy = make_policy(lora=False)
    method, initial = make_method(config, policy), double(policy)
    change(policy, 11)
    wanted = truth(config, double(policy), samples, teacher=initial)
    assert_same(run(method, samples), wanted)


def test_tokens_of_older_weights_are_weighted() -> None:
    """min(s / q, 2), q what the sampler's weights gave the token; without them the loss is another.

    Weights, and so gradients, that are dropped, doubled or turned around are far from these.
    """
    config, policy, samples = settings(*CASES["opsd sampled token, ahead"]), make_policy(), []
    for sample in make_samples():
        own = log_probs(double(policy), sample.student_prompt, sample.completion)
        samples.append(replace(sample, logprobs=chosen(own, sample.completion).tolist()))
    change(policy, 11, std=0.05)
    method, model = make_method(config, policy), double(policy)
    found = run(method, samples)
    assert_same(found, truth(config, model, samples))
    weights = found.stats["importance"]
    assert (weights == 2).sum() > 2 and (weights < 0.7).sum() > 2 and (weights <= 2).all()
    fresh = truth(settings("loss.objective=sampled_token"), model, samples)
    for name, grad in found.grads.items():
        assert (grad - fresh.grads[name]).abs().max() > 0.1 * grad.abs().max(), name
    # Held-out completions are greedy and have no weights.
    greedy = [replace(sample, logprobs=None) for sample in samples]
    assert_same(run(method, greedy), fresh)


def test_divergences_take_samples_as_they_are() -> None:
    for name in ("opsd JSD", "opsd top k"):
        found, fresh = (
            run(make_method(settings(*CASES[name], *more), make_policy()), make_samples())
            for more in (AHEAD, ())
        )
        assert found.loss == fresh.loss and "importance" not in found.stats


def test_state_brings_the_average_back() -> None:
    config = settings("opsd.teacher=ema", f"opsd.ema_decay={DECAY}")
    policy = make_policy(lora=False)
    method = make_method(config, policy)
    start = [p.detach().clone() for p in policy.parameters]
    change(policy, 11)
    method.after_step()
    kept = {name: tensor.clone() for name, tensor in method.state().items()}
    for value, first, last in zip(kept.values(), start, policy.parameters, strict=True):
        torch.testing.assert_close(value, DECAY * first + (1 - DECAY) * last.detach())
    wanted = run(method, make_samples())
    later = make_method(config, policy)
    assert run(later, make_samples()).loss != wanted.loss
    for name, tensor in later.state().items():
        tensor.copy_(kept[name])
    assert run(later, make_samples()).loss == wanted.loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("name", ["opsd JSD", "opsd top k", "opsd sampled token"])
def test_same_prompt_means_no_divergence_before_training(name, lora, dtype) -> None:
    policy = make_policy(lora, dtype, trained=False)
    method = make_method(settings(*CASES[name]), policy)
    found = run(method, make_samples(same_prompt=True))
    assert found.stats["divergence"].abs().max() < 1e-6
    other = run(method, make_samples()).stats["divergence"]
    assert other.abs().min() > 1e-4


def test_statistics() -> None:
    """The divergence of each token adds up to the loss."""
    for name in OBJECTIVES[:4]:  # over the full vocabulary
        found = run(make_method(settings(*CASES[name]), make_policy()), make_samples())
        assert found.stats["divergence"].mean().item() == pytest.approx(found.loss, rel=1e-5)
        for column in ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob"):
            assert found.stats[column].abs().min() > 0
        assert ("clipped_mass" in found.stats) == (name == "opsd clipped")
    found = run(make_method(settings(*CASES["opsd sampled token"]), make_policy()), make_samples())
    assert {"divergence", "logprob"} <= found.stats.keys()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (2.0, 0.5)], ids=["gate", "weights"])
@pytest.mark.parametrize("name", ["opsd JSD", "opsd sampled token"])
def test_verify_weight(name: str, weights: tuple[float, float]) -> None:
    right, wrong = weights
    verify = f"opsd.verify_weight={{correct: {right}, wrong: {wrong}}}"
    config, policy = settings(*CASES[name], verify), make_policy()
    method, samples = make_method(config, policy), make_samples()
    weighed = method.assign_weights(samples)
    assert [s.weight for s in weighed] == [right if s.correct else wrong for s in samples]
    assert [replace(s, weight=1.0) for s in weighed] == samples  # in order, nothing else changed
    correct = sum(len(s.completion) for s in samples if s.correct)
    assert counted(weighed) == (counted(samples) if wrong else correct)
    wanted = truth(config, double(policy), weighed)
    assert_same(run(method, weighed), wanted)
    if wrong == 0:  # the trainer leaves these samples out; nothing else may change
        kept = [sample for sample in weighed if sample.weight > 0]
        assert_same(finish(method, [kept], method.precompute([kept]), counted(weighed)), wanted)


def test_without_verify_weight_every_sample_counts_alike() -> None:
    samples = make_samples()
    assert make_method(settings(), make_policy()).assign_weights(samples) == samples
