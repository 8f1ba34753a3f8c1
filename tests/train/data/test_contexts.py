"""What the teacher sees of a rollout: siblings, feedback, the length limit, and what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.contexts import (
    TOO_LONG,
    TeacherContexts,
    context_metrics,
    feedback_on,
    has_context,
)
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import PromptBuilder
from tests.helpers.tiny import config, make_tokenizer

TEMPLATE = (
    "{{ problem.question }}{% if sibling %} S:{{ sibling }}{% endif %}"
    "{% if feedback %} F:{{ feedback }}{% endif %}"
)
TEXTS = ["two", "three", "four", "five", "six", "seven"]
RIGHT = [True, True, False, False, False, True]


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.eos_token = "<|end|>"
    return made


def recipe(sees: str = "[sibling, feedback]", *overrides: str) -> Config:
    return config(
        "model",
        "runs/none",
        f"prompts.teacher_context={sees}",
        f"prompts.teacher={TEMPLATE}",
        "rollout.samples_per_prompt=3",
        "evaluation.teacher=false",
        "evaluation.divergence=false",
        *overrides,
    )


def samples_of(tokenizer, texts=TEXTS, right=RIGHT) -> list[Sample]:
    """Three samples each of two problems."""
    made = []
    for index, (text, correct) in enumerate(zip(texts, right, strict=True)):
        problem = Problem(f"p{index // 3}", f"q{index // 3}?", "5", "2 + 3 = 5")
        tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        made.append(Sample(problem, [1, 2], None, tokens, correct=correct, answer=text))
    return made


def shown(tokenizer, config: Config, samples: list[Sample], step: int = 1) -> list[Sample]:
    return TeacherContexts(config, PromptBuilder(tokenizer, config.prompts)).add(step, samples)


def text(tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.teacher_prompt)


def test_a_sibling_is_right_and_never_the_sample_itself(tokenizer) -> None:
    siblings = set()
    for step in range(1, 30):
        made = shown(tokenizer, recipe("[sibling]"), samples_of(tokenizer), step)
        first, second, third, fourth, fifth, sixth = (text(tokenizer, sample) for sample in made)
        assert "S:three<" in first and "S:two<" in second  # each other's
        assert "S:seven<" in fourth and "S:seven<" in fifth
        # The only right one of its problem sees nothing: it has its student's prompt.
        assert sixth == tokenizer.decode([1, 2]) and made[5].context == ()
        assert [has_context(sample) for sample in made] == [True] * 5 + [False]
        siblings.add(third.partition("S:")[2])
    assert len(siblings) == 2  # either of two, by chance


def test_which_sibling_is_seeded(tokenizer) -> None:
    def prompts(seed: int) -> list[list[int] | None]:
        config = recipe("[sibling]", f"seed={seed}")
        steps = [shown(tokenizer, config, samples_of(tokenizer), step) for step in range(1, 9)]
        return [sample.teacher_prompt for made in steps for sample in made]

    assert prompts(1) == prompts(1) != prompts(2)


def test_feedback_is_of_the_sample_itself(tokenizer) -> None:
    made = shown(tokenizer, recipe("[feedback]"), samples_of(tokenizer))
    assert text(tokenizer, made[2]).endswith(
        "F:The answer four is wrong. The right answer is 5.<|end|><|assistant|>"
    )
    wanted = [() if right else ("feedback",) for right in RIGHT]
    assert [sample.context for sample in made] == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"correct": True, "answer": "5"}, None),
        ({"correct": False, "answer": "6"}, "The answer 6 is wrong. The right answer is 5."),
        ({"correct": False, "answer": None}, "There is no answer. The right answer is 5."),
        (
            {"correct": False, "answer": None, "finished": False},
            "It was cut off before it came to an answer. The right answer is 5.",
        ),
        ({"correct": False, "answer": "6", "check_failed": "timeout"}, None),
        ({"correct": None, "answer": None}, None),
    ],
)
def test_words_of_the_feedback(changes: dict, words: str | None) -> None:
    sample = Sample(Problem("p", "q?", "5", "s"), [1], None, [2])
    assert feedback_on(replace(sample, **changes)) == words


def test_both_and_neither(tokenizer) -> None:
    made = shown(tokenizer, recipe(), samples_of(tokenizer))
    both = ("sibling", "feedback")
    alone = ("sibling",)  # a right answer gets no feedback
    assert [sample.context for sample in made] == [alone, alone, both, both, both, ()]
    assert context_metrics(made) == {
        "context_sibling": pytest.approx(5 / 6),
        "context_feedback": pytest.approx(3 / 6),
        "context_none": pytest.approx(1 / 6),
        "context_too_long": 0,
    }
    assert context_metrics(samples_of(tokenizer)) == {}


def test_what_a_template_does_not_show_is_not_seen(tokenizer) -> None:
    either = "{% if sibling %}S:{{ sibling }}{% else %}F:{{ feedback }}{% endif %}"
    config = recipe("[sibling, feedback]", f"prompts.teacher={either}")
    made = shown(tokenizer, config, samples_of(tokenizer))
    assert [sample.context for sample in made] == [("sibling",)] * 5 + [()]


def test_a_template_may_cut_what_it_shows(tokenizer) -> None:
    """A sibling that thinks, without its thinking; and the rest has no control token either."""
    thinks = make_tokenizer()
    thinks.eos_token = "<|end|>"
    thinks.add_tokens(["</think>"])
    thinks.chat_template = "{% if false %}</think>{% endif %}" + tokenizer.chat_template
    mark = thinks.convert_tokens_to_ids("<|user|>")
    cut = "{{ problem.question }}{% if sibling %} S:{{ sibling.split('</think>')[-1] }}{% endif %}"
    config = recipe("[sibling]", f"prompts.teacher={cut}")
    samples = samples_of(thinks)
    (end,) = samples[0].completion[-1:]
    spelled = [thinks.convert_tokens_to_ids(c) for c in "long"]
    answer = [thinks.convert_tokens_to_ids(c) for c in "<|user|>5"]
    think = thinks.convert_tokens_to_ids("</think>")
    samples[0] = replace(samples[0], completion=[*spelled, think, *answer, end])
    made = shown(thinks, config, samples)
    assert "S:<|user|>5" in text(thinks, made[1]) and "long" not in text(thinks, made[1])
    assert made[1].teacher_prompt.count(mark) == 1 and think not in made[1].teacher_prompt
    assert made[1].context == ("sibling",) and has_context(made[1])


def test_the_length_limit(tokenizer) -> None:
    """What is too long is left out: another sibling is drawn, then none is shown."""
    texts = ["x" * 200, "short", "bad", "x" * 200, "y" * 200, "bad"]
    samples = samples_of(tokenizer, texts, [True, True, False, True, True, False])
    samples = [replace(sample, answer="5") for sample in samples]
    limit = "prompts.max_prompt_tokens=110"
    for step in range(1, 12):  # whichever is drawn first
        made = shown(tokenizer, recipe("[sibling, feedback]", limit), samples, step)
        assert "S:short<" in text(tokenizer, made[2]).replace(" F:", "<")
        assert made[2].context == ("sibling", "feedback")
        assert made[5].context == ("feedback", TOO_LONG) and "S:" not in text(tokenizer, made[5])
        assert made[1].context == (TOO_LONG,) and made[1].teacher_prompt == [1, 2]
        assert all(len(sample.teacher_prompt) <= 110 for sample in made)
        assert context_metrics(made)["context_too_long"] == pytest.approx(4 / 6)
    (alone,) = shown(tokenizer, recipe("[sibling]", limit), samples)[3:4]
    assert alone.context == (TOO_LONG,) and alone.teacher_prompt == [1, 2]
    assert not has_context(alone)


def test_control_tokens_in_a_sibling_stay_text(tokenizer) -> None:
    # Decoding skips special tokens, so the text has them only where the model spelled them out.
    marks = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    samples = samples_of(tokenizer, ["<|user|>", "b", "c"], [True, False, False])
    spelled = [tokenizer.convert_tokens_to_ids(c) for c in "<|user|>"]
    samples[0] = replace(samples[0], completion=[*spelled, marks[1]])
    made = shown(tokenizer, recipe("[sibling]"), samples)
    assert "S:<|user|>" in text(tokenizer, made[1])
    assert made[1].teacher_prompt.count(marks[0]) == 1


def test_a_template_is_tried_with_and_without_each_text(tokenizer) -> None:
    bad = recipe("[sibling]", "prompts.teacher={{ sibling + 1 }}")
    with pytest.raises(UserError, match=r"prompts\.teacher: "):
        PromptBuilder(tokenizer, bad.prompts)
    fails_without = recipe("[sibling]", "prompts.teacher={{ sibling.strip() }}")
    with pytest.raises(UserError, match=r"prompts\.teacher: "):
        PromptBuilder(tokenizer, fails_without.prompts)
    for template in ("{{ attempt }}", "{% if sibling %}{% endif %}{{ feedback }}"):
        shows_none = recipe("[sibling, feedback]", f"prompts.teacher={template}")
        with pytest.raises(UserError, match=r"does not show the sibling .*\{\{ sibling \}\}"):
            PromptBuilder(tokenizer, shows_none.prompts)
    plain = config("model", "runs/none", "prompts.teacher={{ sibling }}")
    with pytest.raises(UserError, match=r"prompts\.teacher: 'sibling' is undefined"):
        PromptBuilder(tokenizer, plain.prompts)


def test_problems_are_measured_by_the_limit(tokenizer) -> None:
    builder = PromptBuilder(tokenizer, recipe().prompts)
    measured = builder.measure([s.problem for s in samples_of(tokenizer)], ("student", "teacher"))
    assert set(measured.tokens["teacher"]) == {120} and max(measured.tokens["student"]) < 20


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt must be 2 or more"),
        (["evaluation.teacher=true"], "set evaluation.teacher=false"),
        (["evaluation.divergence=true"], "set evaluation.divergence=false"),
        (["method=sft", "rollout.samples_per_prompt=1"], "this recipe uses sft"),
        (["method=context_distill"], "this recipe uses context_distill"),
        (["method=distill", "distill.teacher=t"], "distill.prompt=teacher"),
        (
            [
                *("method=distill", "distill.teacher=t", "distill.prompt=teacher"),
                *("distill.on_policy=0.5", "rollout.samples_per_prompt=1"),
            ],
            "set distill.on_policy=true",
        ),
    ],
)
def test_what_does_not_go_together(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe("[sibling, feedback]", *overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)
