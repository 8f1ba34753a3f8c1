"""Prompts as token ids, with a tiny tokenizer."""

import tracemalloc

import pytest

from opsd_train.config.errors import UserError
from opsd_train.config.schema import PromptsConfig
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import PromptBuilder
from tests.helpers.tiny import CHAT, make_tokenizer

PROBLEM = Problem("p-1", "2 + 3 =", "5", "2 + 3 is 5")
THINKING = CHAT + (
    "{% if enable_thinking is not defined %}{% elif enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def prompts(**more) -> PromptsConfig:
    defaults = {
        "student": "{{ problem.question }}\n",
        "teacher": "{{ problem.question }} [{{ problem.solution }}|{{ problem.answer }}]",
        "max_prompt_tokens": 100,
    }
    return PromptsConfig(**defaults | more)


def test_both_sides_in_the_chat_template(tokenizer):
    builder = PromptBuilder(tokenizer, prompts())
    student, teacher = builder.student(PROBLEM), builder.teacher(PROBLEM)
    assert tokenizer.decode(student) == "<|user|>2 + 3 =<|end|><|assistant|>"
    assert tokenizer.decode(teacher) == "<|user|>2 + 3 = [2 + 3 is 5|5]<|end|><|assistant|>"
    assert student[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_the_student_does_not_see_the_solution(tokenizer):
    builder = PromptBuilder(tokenizer, prompts())
    other = Problem("p-1", PROBLEM.question, "6", "something else")
    assert builder.student(PROBLEM) == builder.student(other)
    assert builder.teacher(PROBLEM) != builder.teacher(other)


def test_system_message_and_plain_text(tokenizer):
    builder = PromptBuilder(tokenizer, prompts(system="Add.", student_chat_template=False))
    assert tokenizer.decode(builder.student(PROBLEM)) == "<s>Add.\n\n2 + 3 ="
    assert tokenizer.decode(builder.teacher(PROBLEM)).startswith("<|system|>Add.<|end|><|user|>2")


def test_plain_text_needs_no_chat_template():
    plain = make_tokenizer(None)
    config = prompts(student_chat_template=False, teacher_chat_template=False)
    assert plain.decode(PromptBuilder(plain, config).student(PROBLEM)) == "<s>2 + 3 ="
    with pytest.raises(UserError, match=r"teacher_chat_template is true.* no chat template"):
        PromptBuilder(plain, prompts(student_chat_template=False))


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (None, None, None),
        (True, True, None),
        (False, False, None),
        (None, True, ("leaves the think block alone", "opens a think block")),
        (False, True, ("closes the think block", "opens a think block")),
    ],
)
def test_a_think_block_on_one_side_gives_a_warning(student, teacher, words, capsys):
    config = prompts(student_thinking=student, teacher_thinking=teacher)
    PromptBuilder(make_tokenizer(THINKING), config)
    said = capsys.readouterr().err
    if words is None:
        assert said == ""
    else:
        assert said.startswith("warning: ") and said.count("\n") == 1
        assert f"student's prompt {words[0]}, the teacher's {words[1]}" in said


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ problem.anser }}", ["prompts.teacher", "anser"]),
        ("{{ question }}", ["prompts.teacher", "'question' is undefined"]),
        ("first\n{% if %}", ["prompts.teacher, line 2"]),
        ("{{ problem.answer + 1 }}", ["prompts.teacher", "str"]),
        ("{{ problem.__class__.__mro__ }}", ["prompts.teacher", "unsafe"]),
    ],
)
def test_bad_templates(tokenizer, template, words):
    with pytest.raises(UserError) as error:
        PromptBuilder(tokenizer, prompts(teacher=template))
    assert all(word in str(error.value) for word in words), error.value


def test_a_chat_template_that_refuses():
    refusing = make_tokenizer("{{ raise_exception('no system role here') }}")
    with pytest.raises(UserError, match="chat template: no system role here"):
        PromptBuilder(refusing, prompts())


BOTH = ("student", "teacher")


def test_prompts_within_the_limit_are_all_kept(tokenizer, capsys):
    problems = [PROBLEM] * 3
    longest = len(PromptBuilder(tokenizer, prompts()).teacher(PROBLEM))
    builder = PromptBuilder(tokenizer, prompts(max_prompt_tokens=longest))
    assert builder.filter(problems, BOTH) == problems
    assert capsys.readouterr().err == ""


def test_overlong_prompts_are_counted_and_the_longest_named(tokenizer, capsys):
    wordy = Problem("p-2", "2 + 3 =", "5", "x" * 200)
    long_question = Problem("p-3", "y" * 100, "5", "5")
    problems = [PROBLEM, wordy, long_question]
    limit = "prompts.max_prompt_tokens=100"
    with pytest.raises(UserError) as error:
        PromptBuilder(tokenizer, prompts()).filter(problems, BOTH)
    for word in ("2 of 3 problems", limit, "teacher prompt of p-2, 215 tokens", "overlong=skip"):
        assert word in str(error.value), error.value

    builder = PromptBuilder(tokenizer, prompts(overlong="skip"))
    assert builder.filter(problems, BOTH) == [PROBLEM]
    said = capsys.readouterr().err
    assert said.startswith("skipped: 2 of 3 problems") and said.count("\n") == 1
    with pytest.raises(UserError, match="none is left"):
        builder.filter([wordy], BOTH)
    assert builder.filter([wordy], ["student"]) == [wordy]  # the teacher's prompt is not used


def test_solutions_as_completions(tokenizer):
    tokenizer.eos_token = "<|end|>"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    builder = PromptBuilder(tokenizer, prompts(max_solution_tokens=3, overlong="skip"))
    tokens = builder.solution(Problem("p", "q", "5", "ab"))
    assert tokens == [*tokenizer("ab", add_special_tokens=False)["input_ids"], end]
    short, longer = Problem("p-4", "q", "5", "ab"), Problem("p-5", "q", "5", "abc")
    assert builder.filter([short, longer], ["student", "solution"]) == [short]
    builder = PromptBuilder(tokenizer, prompts())
    assert builder.measure([short, longer], ["solution"]).longest("solution") == (4, longer)


def test_measuring_takes_memory_for_a_batch_not_for_all_rows(tokenizer):
    plain = {"student_chat_template": False, "teacher_chat_template": False}
    builder = PromptBuilder(tokenizer, prompts(**plain))
    problems = [Problem(f"p-{i}", f"{i} + 1 =", str(i + 1), f"{i} + 1") for i in range(4000)]
    tracemalloc.start()
    try:
        builder.filter(problems, BOTH)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / len(problems) < 800  # bytes; all at once it was 1,800
