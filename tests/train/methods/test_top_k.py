"""loss.objective=top_k: the teacher's most likely tokens, and the rest as one outcome."""

import pytest
import torch

from opsd_train.config.errors import UserError
from tests.helpers.method_cases import (
    CASES,
    TEACHER_VOCAB,
    VOCAB,
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
    make_teacher,
    reweighted,
    run,
    settings,
    truth,
)

DISTILL = ("method=distill", "distill.teacher=t")
TOP = "loss.objective=top_k"
# Its teacher's vocabulary is padded further than the student's.
METHODS = pytest.mark.parametrize("method", [(), DISTILL], ids=["opsd", "distill"])


@METHODS
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_k_of_the_whole_vocabulary_is_the_full_objective(method, lora: bool, beta: float) -> None:
    common = (*method, f"loss.beta={beta}", "loss.temperature=1.3")
    found = []
    for overrides in ((), (TOP, f"loss.top_k={TEACHER_VOCAB + 5}")):
        policy = make_policy(lora)
        made = make_method(settings(*common, *overrides), policy)
        change(policy, 11)
        found.append(run(made, make_samples()))
    full, sparse = found
    assert_same(sparse, full)
    assert not {"teacher_entropy", "clipped_mass"} & sparse.stats.keys()
    for name, column in sparse.stats.items():
        torch.testing.assert_close(column, full.stats[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 8, 200])
def test_a_teacher_that_is_a_moving_average_and_a_head_that_is_trained(k: int) -> None:
    ema = ("opsd.teacher=ema", "opsd.ema_decay=0.5")
    config = settings(*ema, TOP, f"loss.top_k={k}", "loss.beta=0.5")
    policy = make_policy(lora=False, tied=False)
    method, first = make_method(config, policy), double(policy)
    change(policy, 11)
    method.after_step()
    its = double(policy)
    for average, start in zip(its.parameters(), first.parameters(), strict=True):
        average.data = (average.data + start.data) / 2
    found = run(method, make_samples())
    assert_same(found, truth(config, double(policy), make_samples(), teacher=its))
    assert "lm_head.weight" in found.grads


@METHODS
def test_statistics_are_those_of_full_logits(method) -> None:
    config, policy, samples = settings(*method, TOP, "loss.top_k=4"), make_policy(), make_samples()
    found = run(make_method(config, policy), samples)
    model = double(policy)
    with torch.no_grad():
        rows = [log_probs(model, s.student_prompt, s.completion) for s in order(samples)]
    label = [chosen(row, s.completion) for row, s in zip(rows, order(samples), strict=True)]
    entropy = [-(row.exp() * row).sum(-1) for row in rows]
    for name, wanted in (("student_logprob", label), ("student_entropy", entropy)):
        wanted = torch.cat(wanted)
        torch.testing.assert_close(found.stats[name].double(), wanted, rtol=1e-4, atol=1e-5)
    assert found.stats["divergence"].mean().item() == pytest.approx(found.loss, rel=1e-5)


def order(samples: list) -> list:
    """As one micro-batch has them."""
    return sorted(samples, key=lambda sample: sample.longest)


def test_token_weights() -> None:
    config, policy = settings(*CASES["opsd top k"]), make_policy()
    samples = reweighted(make_samples(4), [2.0, 0.5, 0.0, 1.0])
    method = make_method(config, policy)
    wanted = truth(config, double(policy), samples)
    assert_same(run(method, samples), wanted)
    kept = [sample for sample in samples if sample.weight > 0]
    assert_same(finish(method, [kept], method.precompute([kept]), counted(samples)), wanted)


def test_the_top_tokens_are_entries_that_both_models_have() -> None:
    config = settings(*CASES["distill top k"], f"loss.top_k={VOCAB}")
    method = make_method(config, make_policy(), make_teacher())
    (found,) = method.precompute([make_samples()])[0].teachers
    assert found.vocab_size == VOCAB
    ids, probabilities = found.ids.cpu(), found.logprob.cpu().exp()
    assert torch.equal(ids.sort(-1).values, torch.arange(VOCAB).expand(len(ids), -1))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(ids)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [TOP, "loss.token_clip=0.05"],
            "loss.token_clip works with loss.objective=full_vocabulary",
        ),
        (["loss.top_k=8"], "loss.top_k=8 needs loss.objective=top_k"),
        ([TOP, "loss.top_k=0"], "loss.top_k"),
    ],
)
def test_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings(*overrides)
