"""Several teachers in one micro-batch, each for the problems that name it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.fingerprint import fingerprint
from opsd_train.data.problems import Problem, load_problems
from opsd_train.dry_run.plan import expected
from opsd_train.methods.distill import Distill
from opsd_train.methods.teachers import LocalTeacher, refuse_unknown_teachers
from opsd_train.model.policy import Policy
from tests.helpers import devices, tiny
from tests.helpers.method_cases import (
    AHEAD,
    PAD,
    VOCAB,
    Outcome,
    assert_same,
    counted,
    double,
    make_policy,
    make_samples,
    reweighted,
    run,
    settings,
    truth,
)

NAMES = ("math", "code")
OBJECTIVES = {
    "JSD": ("loss.beta=0.5", "loss.temperature=1.3"),
    "top k": ("loss.objective=top_k", "loss.top_k=8"),
    "sampled token": ("loss.objective=sampled_token",),
    "sampled token, ahead": (*AHEAD, "loss.objective=sampled_token"),
}


def config_of(*overrides: str, prompt: str = "student") -> Config:
    """The second teacher reads the prompt `prompt`."""
    teachers = {"math": {"teacher": "m"}, "code": {"teacher": "c", "prompt": prompt}}
    return settings(
        "method=distill",
        f"distill={json.dumps({'teachers': teachers})}",
        *("data.source=file", "data.path=p.jsonl", "data.columns.teacher=expert"),
        *overrides,
    )


def make_teachers() -> dict[str, Policy]:
    """Two models of other sizes than the student's, with vocabularies padded further."""
    models = {
        "math": tiny.make_model(VOCAB + 27, hidden_size=48),
        "code": tiny.make_model(VOCAB + 9, hidden_size=64),
    }
    return {
        name: Policy(model.requires_grad_(False).to(devices.NAME), PAD, torch.float32)
        for name, model in models.items()
    }


def make_method(config: Config, policy: Policy, models: dict[str, Policy]) -> Distill:
    options = {name: teacher.prompt for name, teacher in config.distill.by_name().items()}
    teachers = {
        name: LocalTeacher(model, options[name], config.loss, VOCAB)
        for name, model in models.items()
    }
    return Distill(config, policy, teachers)


def routed(samples: list[Sample], names: list[str]) -> list[Sample]:
    return [
        replace(sample, problem=replace(sample.problem, teacher=name))
        for sample, name in zip(samples, names, strict=True)
    ]


def summed(parts: list[Outcome]) -> Outcome:
    first, *others = parts
    grads = {n: g + sum(o.grads[n] for o in others) for n, g in first.grads.items()}
    return Outcome(sum(part.loss for part in parts), {}, grads)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_the_loss_is_the_sum_of_the_separate_ones(objective: str, lora: bool) -> None:
    """Each against full logits of its own teacher, one of which reads its own prompt."""
    config = config_of(*OBJECTIVES[objective], prompt="teacher")
    policy, models = make_policy(lora), make_teachers()
    method, samples = make_method(config, policy, models), make_samples()
    samples = routed(samples, ["math", "code", "code", "math", "code", "code", "math", "code"])
    found = run(method, samples)
    parts = []
    for name in NAMES:
        own = [sample for sample in samples if sample.problem.teacher == name]
        prompt = f"distill.prompt={config.distill.by_name()[name].prompt}"
        alone = settings(*OBJECTIVES[objective], "method=distill", "distill.teacher=t", prompt)
        part = truth(alone, double(policy), own, teacher=double(models[name]))
        share = counted(own) / counted(samples)
        parts.append(Outcome(part.loss * share, {}, {n: g * share for n, g in part.grads.items()}))
        assert min(abs(part.loss) for part in parts) > 1e-3
    assert_same(found, summed(parts))
    longest = max(sample.longest for sample in samples)
    assert_same(run(method, samples, budget=longest), found, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_and_weights_stay_with_their_tokens(objective: str) -> None:
    config, policy, models = config_of(*OBJECTIVES[objective]), make_policy(), make_teachers()
    method = make_method(config, policy, models)
    samples = sorted(make_samples(6), key=lambda sample: sample.longest)
    weights = [1.0, 0.5, 2.0, 1.0, 3.0, 0.25]
    samples = reweighted(routed(samples, ["code", "math", "math", "code", "math", "code"]), weights)
    found, first = run(method, samples), 0
    total = 0.0
    for sample in samples:
        alone = run(method, [sample])
        size = len(sample.completion)
        total += alone.loss * size
        for name, column in alone.stats.items():
            mine = found.stats[name][first : first + size]
            torch.testing.assert_close(mine, column, rtol=1e-4, atol=1e-5)
        first += size
    assert found.loss == pytest.approx(total / first, rel=1e-4)


def test_a_sharded_teacher_is_called_once_a_micro_batch() -> None:
    """Whether or not this rank has a sample of it: another rank may."""
    config, policy = config_of(), make_policy()
    method = make_method(config, policy, make_teachers())
    calls = []
    for name, teacher in method.teachers.items():
        made = teacher.distribution
        teacher.distribution = lambda group, name=name, made=made: calls.append(name) or made(group)
        teacher.sharded = True
    samples = routed(make_samples(4), ["code", "code", "math", "code"])
    found = method.precompute([samples[:2], samples[2:3], samples[2:]])
    assert calls == [*NAMES] * 3
    assert [len(parts.teachers) for parts in found] == [1, 1, 2]


def test_a_token_that_one_of_the_teachers_lacks() -> None:
    config = config_of()
    method = make_method(config, make_policy(vocab_size=288), make_teachers())
    (sample,) = make_samples(1)
    beyond = replace(sample, completion=[5, 275])
    run(method, routed([beyond], ["math"]))
    with pytest.raises(UserError, match=r"distill\.teacher=c: .* p0 has token 275.* 288 .* 270"):
        run(method, routed([beyond], ["code"]))


def rows(path: Path, teachers: list[str | None]) -> Path:
    lines = [
        {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n + 1}.", "expert": teacher}
        for n, teacher in enumerate(teachers)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def data(path: Path, *overrides: str) -> Config:
    return config_of(
        f"data.path={path}",
        "data.train_size=null",
        "data.heldout_size=1",
        "evaluation.problems=1",
        *overrides,
    )


def test_the_column_names_each_problems_teacher(tmp_path: Path) -> None:
    path = rows(tmp_path / "p.jsonl", ["math", "code", "code", "math"])
    config = data(path)
    problems = [p for part in load_problems(config.data) for p in part]
    assert {p.id: p.teacher for p in problems} == {
        "p-1": "math", "p-2": "code", "p-3": "code", "p-4": "math"
    }  # fmt: skip
    refuse_unknown_teachers(config, problems)
    without = [replace(problem, teacher=None) for problem in problems]
    assert fingerprint(problems, []) != fingerprint(without, [])
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "1"}],
         "expert": "code"}
        for n in range(3)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, chats)))
    assert {p.teacher for part in load_problems(data(path).data) for p in part} == {"code"}


def test_problems_without_a_teacher(tmp_path: Path) -> None:
    config = config_of()
    for teacher, words in (("maths", "'maths' in column 'expert'.*mean math"), (None, "None")):
        problem = Problem("p-7", "q", "a", "s", teacher=teacher)
        with pytest.raises(UserError, match=f"problem p-7 names the teacher {words}"):
            refuse_unknown_teachers(config, [problem])
    path = rows(tmp_path / "p.jsonl", ["math", None, "code"])
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: column 'expert' is empty"):
        load_problems(data(path).data)
    with pytest.raises(UserError, match=r"no column 'tutor'.*set data\.columns\.teacher"):
        load_problems(data(path, "data.columns.teacher=tutor").data)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distill.teacher=t"], "distill.teacher names the teacher, or distill.teachers several"),
        (["distill={}"], "distill.teacher names the teacher, or distill.teachers several"),
        (["distill.prompt=teacher"], r"set distill\.teachers\.NAME\.prompt"),
        (["distill.cache=c"], r"set distill\.teachers\.NAME\.cache"),
        (["distill.teachers.math.cache=c"], "set loss.objective=top_k"),
        (
            ["distill.teachers.math.cache=c", "distill.teachers.code.cache=c"],
            "two teachers have the same cache",
        ),
        (["data.columns.teacher=null"], "distill.teachers needs data.columns.teacher"),
        (["data.source=reasoning_gym"], "distill.teachers needs data.columns.teacher"),
        (["distill={teacher: t}"], r"data\.columns\.teacher=expert chooses among distill.teachers"),
        (["distill.teachers.math.techer=t"], r"unknown key distill\.teachers\.math\.techer"),
    ],
)
def test_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(*overrides)


def test_a_dry_run_counts_every_teacher(tmp_path: Path, tiny_folder: Path) -> None:
    wide = tiny.save_model(tmp_path / "wide")
    tiny.make_model(VOCAB + 9, hidden_size=64).save_pretrained(wide)
    path = rows(tmp_path / "p.jsonl", ["math", "code", "code", "math"])
    both = data(
        path,
        f"model.name_or_path={tiny_folder}",
        *(f"distill.teachers.math.teacher={tiny_folder}", "distill.teachers.math.dtype=float32"),
        f"distill.teachers.code.teacher={wide}",
    )
    small = sum(p.numel() for p in tiny.make_model().parameters())
    large = sum(p.numel() for p in tiny.make_model(VOCAB + 9, hidden_size=64).parameters())
    phases = expected(both)
    assert phases["load"].parts["the teacher's weights"] == 4 * small + 2 * large
    assert phases["teacher"].total > phases["load"].total
