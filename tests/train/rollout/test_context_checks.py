"""What must fit the model's context, method by method, and the key that helps where it does not."""

from array import array
from types import SimpleNamespace

import pytest
import yaml

from opsd_train import cli
from opsd_train.config.errors import UserError
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import Measured
from opsd_train.methods import METHODS
from opsd_train.rollout.context_checks import check_context, heldout_texts
from tests.helpers.method_cases import settings
from tests.helpers.tiny import make_model, make_tokenizer, recipe

TOKENS = {"student": (30, 20), "teacher": (50, 60), "solution": (40, 45)}  # of two problems
NEW, ANSWER = 10, 15
LIMITS = (f"rollout.max_new_tokens={NEW}", f"evaluation.max_new_tokens={ANSWER}")


def measured(texts: tuple[str, ...]) -> Measured:
    problems = [Problem(f"p-{n}", "q", "a", "s") for n in range(2)]
    return Measured(problems, {side: array("i", TOKENS[side]) for side in texts})


def check(limit: int | None, *overrides: str, teacher: int | None = None) -> str | None:
    """What is wrong, for models with contexts of `limit` and, if there is one, `teacher`."""
    config = settings(*LIMITS, *overrides)
    train = measured(METHODS[config.method].required_texts(config))
    asked = measured(heldout_texts(config))
    if config.evaluation.problems == 0:
        asked = Measured([], asked.tokens)
    teachers = {None: reader(teacher)} if teacher else {}
    try:
        check_context(config, reader(limit), teachers, train, asked)
    except UserError as error:
        return str(error)
    return None


def reader(limit: int | None) -> SimpleNamespace:
    text = SimpleNamespace() if limit is None else SimpleNamespace(max_position_embeddings=limit)
    return SimpleNamespace(get_text_config=lambda: text)


NONE = "evaluation.problems=0"
OFFLINE = ("method=distill", "distill={teacher: t, on_policy: false}")
CASES = {
    # solutions: the longest prompt and solution of one problem, 30 + 40; nothing is generated
    "sft": (["method=sft", NONE], 70, "max_solution_tokens, with prompts.overlong=skip"),
    "distill off-policy": ([*OFFLINE, NONE], 70, "student prompt and solution of p-0 have 70"),
    # rollouts: the prompts of whoever writes or reads them, and rollout.max_new_tokens
    "opsd": ([NONE], 70, "teacher prompt of p-1 has 60 tokens and with rollout.max_new_tokens=10"),
    "context_distill": (["method=context_distill", NONE], 70, "teacher prompt of p-1"),
    "star": (["method=star", NONE], 40, "set rollout.max_new_tokens to 9 or less"),
    "grpo": (
        ["method=grpo", "rollout.samples_per_prompt=2", NONE],
        40,
        "student prompt of p-0 has 30",
    ),
    "distill": (["method=distill", "distill.teacher=t", NONE], 40, "student prompt of p-0 has 30"),
    # evaluation: greedy answers under the student's prompt, the teacher's if it is asked
    "evaluation": (
        ["method=star", "evaluation.teacher=false", "rollout.max_new_tokens=1"],
        45,
        "student prompt of the held-out p-0 has 30 tokens and with evaluation.max_new_tokens=15",
    ),
    "the teacher's evaluation": (
        ["method=star", "rollout.max_new_tokens=1"],
        75,
        "set evaluation.max_new_tokens to 14 or less",
    ),
    "the divergence of an evaluation": (
        ["evaluation.teacher=false", "rollout.max_new_tokens=1"],
        75,
        "teacher prompt of the held-out p-1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_longest_sequence_of_a_method(name: str) -> None:
    overrides, longest, words = CASES[name]
    assert check(longest, *overrides) is None
    found = check(longest - 1, *overrides)
    assert words in found and f"more than the model's context of {longest - 1}" in found
    assert len(found) < 190
    assert check(None, *overrides) is None  # it names no limit


def test_a_prompt_that_fills_the_context_needs_another_key() -> None:
    assert "lower prompts.max_prompt_tokens, with prompts.overlong=skip" in check(60, NONE)


def test_the_teacher_of_another_model_has_a_context_too() -> None:
    assert check(70, *OFFLINE, NONE, teacher=70) is None
    assert "than the teacher's context of 69" in check(70, *OFFLINE, NONE, teacher=69)


def test_a_student_need_not_read_the_prompt_of_another_teacher() -> None:
    privileged = ("method=distill", "distill={teacher: t, prompt: teacher}", NONE)
    assert check(40, *privileged, teacher=70) is None
    assert "student prompt of p-0" in check(39, *privileged, teacher=70)
    found = check(40, *privileged, teacher=69)
    assert "teacher prompt of p-1 has 60 tokens" in found and "the teacher's context of 69" in found
    offline = ("method=distill", "distill={teacher: t, prompt: teacher, on_policy: false}", NONE)
    assert check(70, *offline, teacher=105) is None
    assert "teacher prompt and solution of p-1 have 105" in check(70, *offline, teacher=104)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "teacher prompt of chain_sum-"),
        (["evaluation.max_new_tokens=80"], "with evaluation.max_new_tokens=80"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_run_and_its_dry_run_check(tmp_path, capsys, changes: list, words: str, dry: list):
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.eos_token, model.config.max_position_embeddings = "<|end|>", 128
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    made = recipe(tmp_path / "model", tmp_path / "run")
    made["rollout"]["max_new_tokens"] = 5 if changes else 100
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    assert cli.main([str(tmp_path / "r.yaml"), *changes, *dry]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in line and "model's context of 128" in line and len(line) < 200


def test_a_solution_that_fits_needs_no_room_for_a_rollout(tmp_path) -> None:
    assert check(70, "method=sft", "rollout.max_new_tokens=5000", NONE) is None
