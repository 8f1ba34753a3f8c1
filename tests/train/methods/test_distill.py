"""Distillation from another model: other width, other padding of the vocabulary, same tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsd_train.config.errors import UserError
from opsd_train.distributed.context import DistributedContext
from opsd_train.model.policy import Policy, load_teacher, load_tokenizer
from tests.helpers.method_cases import (
    CASES,
    assert_same,
    change,
    double,
    make_method,
    make_policy,
    make_samples,
    make_teacher,
    run,
    settings,
    truth,
)
from tests.helpers.tiny import make_model, make_tokenizer

CPU = DistributedContext(torch.device("cpu"))
ON_POLICY = CASES["distill"]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize(
    "overrides",
    [
        ON_POLICY,
        (*ON_POLICY, "loss.beta=0.0"),
        CASES["distill top k"],
        CASES["distill sampled token"],
    ],
    ids=["JSD", "forward KL", "top k", "sampled token"],
)
def test_loss_and_gradient_equal_full_logits(overrides: tuple[str, ...], lora: bool) -> None:
    config, policy, samples = settings(*overrides), make_policy(lora), make_samples()
    teacher = make_teacher()
    method, its = make_method(config, policy, teacher), double(teacher)
    change(policy, 11)
    method.after_step()  # which changes nothing: the teacher is frozen
    assert_same(run(method, samples), truth(config, double(policy), samples, teacher=its))
    assert all(
        p.grad is None and torch.equal(p.cpu().double(), q)
        for p, q in zip(teacher.model.parameters(), its.parameters(), strict=True)
    )


def test_the_teacher_has_the_smaller_vocabulary() -> None:
    config, samples = settings(*ON_POLICY), make_samples()
    policy, teacher = make_policy(vocab_size=288), make_teacher(vocab_size=261)
    found = run(make_method(config, policy, teacher), samples)
    assert_same(found, truth(config, double(policy), samples, teacher=double(teacher)))


def test_bfloat16_teacher_beside_a_float32_student() -> None:
    config, policy, samples = settings(*ON_POLICY), make_policy(), make_samples()
    teacher = make_teacher(torch.bfloat16)
    found = run(make_method(config, policy, teacher), samples)
    # The student is in float32; the teacher's states have bfloat16's 8 bits.
    assert_same(found, truth(config, double(policy), samples, teacher=double(teacher)), rel=0.05)


def test_the_teacher_reads_the_students_prompt() -> None:
    config, policy, samples = settings(*ON_POLICY), make_policy(), make_samples()
    method = make_method(config, policy)
    blind = [replace(sample, teacher_prompt=None) for sample in samples]
    assert run(method, samples).loss == pytest.approx(run(method, blind).loss, rel=1e-5)
    assert not method.teacher_prompt(config)


def test_trajectories_on_and_off_policy() -> None:
    for on_policy, source in (("true", "student"), ("false", "solution")):
        config = settings(*ON_POLICY, f"distill.on_policy={on_policy}")
        assert make_method(config, make_policy()).source(config) == source


def test_a_sampled_token_that_the_teacher_lacks() -> None:
    config = settings(*ON_POLICY)
    policy, teacher = make_policy(vocab_size=288), make_teacher(vocab_size=261)
    sample = make_samples()[0]
    beyond = replace(sample, completion=[5, 270])
    method = make_method(config, policy, teacher)
    with pytest.raises(UserError, match=r"p0 has token 270.* student's .* 288 .* 261"):
        run(method, [sample, beyond])


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory) -> dict[str, Path]:
    """A student, a padded and wider teacher, and one with another tokenizer."""
    made = {"student": tiny_folder}
    for name in ("wide", "foreign"):
        made[name] = tmp_path_factory.mktemp(name)
        make_model(288, hidden_size=48).save_pretrained(made[name])
        tokenizer = make_tokenizer()
        tokenizer.eos_token = "<|end|>"
        if name == "foreign":
            tokenizer.add_tokens(["<|other|>"])
        tokenizer.save_pretrained(made[name])
    return made


def loaded(folders: dict[str, Path], teacher: str) -> Policy:
    config = settings(*ON_POLICY[:1], f"distill.teacher={folders[teacher]}")
    config = replace(config, model=replace(config.model, name_or_path=str(folders["student"])))
    (settings_of_it,) = config.distill.by_name().values()
    return load_teacher(config, settings_of_it, load_tokenizer(config.model), CPU, "none")


def test_load_teacher_freezes_it(folders: dict[str, Path]) -> None:
    teacher = loaded(folders, "wide")
    weights = list(teacher.model.parameters())
    assert teacher.parameters == [] and not teacher.model.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in weights)


def test_another_tokenizer(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"distill\.teacher=.*foreign.* another tokenizer"):
        loaded(folders, "foreign")
