"""The sets: real names, splits and columns on the hub; tasks, files and held-out problems."""

import json
import sys
from types import SimpleNamespace

import pytest

from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.data.problems import load_problems
from opsd_train.evaluation.sets import load_set, set_label
from opsd_train.evaluation.settings import EvalConfig
from tests.helpers.tiny import config as run_config

AIME24 = {
    "id": 60,
    "problem": "What is 100 + 104?",
    "solution": "It is \\boxed{204}.",
    "answer": "204",
    "url": "https://example.org/aime",
    "year": "2024",
}
MATH_ARENA = {"problem_idx": 1, "problem": "Half of 1?", "answer": "\\frac{1}{2}"}
MATH_500 = {
    "problem": "Where is the origin?",
    "solution": "At $\\boxed{(0, 0)}$.",
    "answer": "(0, 0)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/1.json",
}


def amo(number: int, kind: str) -> dict:
    return {
        "question_id": number,
        "prompt": f"What is {number}?",
        "solution": "Count.",
        "answer": f"\\boxed{{\\frac{{{number}}}{{2}}}}",
        "answer_type": kind,
    }


HUB = {
    "aime24": ("HuggingFaceH4/aime_2024", "train", [AIME24]),
    # AIME's answers are numbers in this data set, not text.
    "aime25": ("MathArena/aime_2025", "train", [MATH_ARENA | {"answer": 70}]),
    "hmmt25": ("MathArena/hmmt_feb_2025", "train", [MATH_ARENA | {"problem_type": ["Algebra"]}]),
    "math-500": ("HuggingFaceH4/MATH-500", "test", [MATH_500]),
}


class Rows(list):
    """What the reader uses of a datasets.Dataset."""

    column_names = property(lambda self: list(self[0]))

    def select_columns(self, columns):
        return Rows({name: row[name] for name in columns} for row in self)


@pytest.fixture
def hub(monkeypatch):
    """A hub with these rows; what was asked of it is in `asked`."""
    fake = SimpleNamespace(asked=[], rows=[])

    def load_dataset(name, subset, split):
        fake.asked.append((name, subset, split))
        return Rows(fake.rows)

    errors = SimpleNamespace(DatasetsError=LookupError)
    module = SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return fake


def settings(*overrides: str) -> EvalConfig:
    recipe = load_recipe("demo/eval", "eval") | {"output_dir": "unused"}
    return config_from(recipe, overrides, EvalConfig)


@pytest.mark.parametrize("name", HUB)
def test_sets_of_the_hub(hub, name):
    path, split, hub.rows = HUB[name]
    (problem,) = load_set(name, settings(), None)
    assert hub.asked == [(path, None, split)]
    row = hub.rows[0]
    assert (problem.question, problem.answer) == (row["problem"], str(row["answer"]))
    assert (problem.set, problem.task, problem.entry) == (name, None, None)


def test_amo_bench_without_the_answers_that_only_a_reader_can_grade(hub):
    kinds = ["number", "description", "set", "variable", "description"]
    hub.rows = [amo(number, kind) for number, kind in enumerate(kinds, 1)]
    problems = load_set("amo-bench", settings(), None)
    assert hub.asked == [("meituan-longcat/AMO-Bench", None, "test")]
    assert [problem.question for problem in problems] == [f"What is {n}?" for n in (1, 3, 4)]
    assert [problem.answer for problem in problems] == [f"\\frac{{{n}}}{{2}}" for n in (1, 3, 4)]
    assert len({problem.problem for problem in problems}) == 3
    assert len(load_set("amo-bench", settings("problems=2"), None)) == 2


def test_a_set_with_other_columns_is_an_error(hub):
    hub.rows = [{"question": "1 + 1?", "answer": "2"}]
    with pytest.raises(UserError, match=r"HuggingFaceH4/aime_2024: .*'problem'.*'question'"):
        load_set("aime24", settings(), None)


def test_a_task_has_distinct_problems_with_their_entries():
    config = settings("tasks.chain_sum={min_terms: 2, max_terms: 2, max_digits: 1, min_digits: 1}")
    problems = load_set("chain_sum", config, None)
    assert len({problem.question for problem in problems}) == len(problems) == 200
    assert problems == load_set("chain_sum", config, None)
    problem = problems[0]
    assert problem.task == "chain_sum" and problem.entry["answer"] == problem.answer
    assert problem.entry["metadata"]["num_terms"] == 2
    json.dumps(problem.entry)
    assert problem != load_set("chain_sum", settings("problems=1"), None)[0]
    few = settings(
        "seed=5", "problems=3", "tasks.chain_sum={min_terms: 2, max_terms: 2, max_digits: 1}"
    )
    assert load_set("chain_sum", few, None) == problems[:3]


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("chain_sun", [], ["chain_sun", "did you mean chain_sum", "aime24"]),
        ("aime-24", [], ["did you mean aime24"]),
        ("heldout", [], ["held-out problems of a run", "folder"]),
        ("chain_sum", ["tasks.chain_sum.min_term=1"], ["tasks.chain_sum.min_term", "min_terms"]),
        ("chain_sum", ["tasks.chain_sum.min_terms=9"], ["tasks.chain_sum does not suit"]),
        ("no.jsonl", [], ["cannot read", "no.jsonl"]),
        (
            "chain_sum",
            ["tasks.chain_sum={min_terms: 2, max_terms: 2, max_digits: 1}", "problems=999"],
            ["200 distinct", "lower problems"],
        ),
    ],
)
def test_wrong_names_and_settings(name, overrides, words):
    with pytest.raises(UserError) as error:
        load_set(name, settings(*overrides), None)
    assert all(word in str(error.value) for word in words), error.value


def test_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "1 + 1?", "answer": 2}\n{"q": "2 + 2?", "answer": "4"}\n')
    problems = load_set(str(path), settings("columns.question=q"), None)
    assert [(p.set, p.problem, p.question, p.answer) for p in problems] == [
        (str(path), "mine-1", "1 + 1?", "2"),
        (str(path), "mine-2", "2 + 2?", "4"),
    ]
    assert load_set(str(path), settings("columns.question=q", "problems=1"), None) == problems[:1]


def test_held_out_problems_are_those_that_training_evaluates(tmp_path):
    run = run_config("model", tmp_path, "data.heldout_size=9", "evaluation.problems=6")
    problems = load_set("heldout", settings(), run)
    wanted = load_problems(run.data)[1][:6]
    assert [(p.problem, p.question) for p in problems] == [(p.id, p.question) for p in wanted]
    for problem in problems:
        assert problem.task == "chain_sum"
        assert (problem.question, problem.answer) == (
            problem.entry["question"],
            problem.entry["answer"],
        )
    silent = run_config("model", tmp_path, "data.heldout_size=9", "evaluation.problems=0")
    assert len(load_set("heldout", settings(), silent)) == 9


def test_held_out_problems_of_another_run(tmp_path):
    from opsd_train.config.load import to_yaml

    (tmp_path / "config.yaml").write_text(to_yaml(run_config("model", tmp_path)))
    assert set_label(str(tmp_path)) == "heldout"
    problems = load_set(str(tmp_path), settings(), None)
    assert len(problems) == 6 and {problem.set for problem in problems} == {"heldout"}


def test_a_task_whose_scorer_does_not_survive_json_is_refused():
    with pytest.raises(UserError, match="does not take the task's own answer"):
        load_set("rearc", settings("problems=1"), None)
