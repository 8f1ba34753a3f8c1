"""Every task of reasoning_gym: its own answer is right, however it stands in the completion."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from opsd_train.evaluation.grading import Answer, Grade, grade_one

NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
OF_OTHERS = {"composite"}  # whose answers are those of the tasks it is made of
TASKS = sorted(DATASETS.keys() - NO_ANSWER - OF_OTHERS)
ANYTHING = {"game_of_life_halting"}  # its scorer gives 1 to any text
SLOW = {"knight_swap"}  # seconds to make two entries
FORMS = {
    "word for word": "{}",
    "boxed": r"So it is \boxed{{{}}}.",
    "after a thought": "<think>\nIs it \\boxed{{7}}?\n</think>\n\n{}\n",
    "after text": "I have worked it out:\n\n{}",
    "as code": "```\n{}\n```\n",
}


def entries(task: str, count: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Entries as the other process gets them, and the task itself."""
    data = reasoning_gym.create_dataset(task, size=count, seed=1)
    for entry in data:
        yield pickle.loads(pickle.dumps(entry)), data


def verdict(text: str, task: str, entry: dict[str, Any], *, by_task: bool = True) -> Grade:
    scored_by = (task, entry, {}) if by_task else ()
    return grade_one(Answer(text, entry["answer"], *scored_by))


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=pytest.mark.slow if t in SLOW else ()) for t in TASKS]
)
def test_its_own_answer_is_right_and_another_one_only_if_it_says_so(task: str) -> None:
    (entry, data), (other, _) = entries(task, 2)
    for name, form in FORMS.items():
        text = form.format(entry["answer"])
        assert verdict(text, task, entry) == Grade(True, entry["answer"], True), name
        assert verdict(text, task, entry, by_task=False).correct, f"{name}, by math-verify"
    if task in ANYTHING:
        says = other["answer"] == entry["answer"]
    else:
        says = data.score_answer(other["answer"], entry) == 1.0
    assert verdict(other["answer"], task, entry).correct == says
    assert not verdict("I do not know.", task, entry).correct
    assert not verdict("", task, entry).correct


@pytest.mark.parametrize("task", sorted(NO_ANSWER))
def test_tasks_without_an_answer(task: str) -> None:
    """Training and evaluation refuse them."""
    ((entry, _),) = entries(task, 1)
    assert entry["answer"] is None
