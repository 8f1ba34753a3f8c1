"""Problems: distinct, split without overlap, and clear errors for bad sources."""

import json
from collections import Counter

import pytest

from opsd_train.data import Problem, load_problems, majority_answer
from opsd_train.errors import UserError
from opsd_train.sections import ColumnsConfig, DataConfig

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def made(task="chain_sum", train_size=20, heldout_size=10, **more) -> DataConfig:
    return DataConfig(
        source="reasoning_gym", task=task, train_size=train_size, heldout_size=heldout_size, **more
    )


def jsonl(path, lines, train_size=2, heldout_size=1, **more) -> DataConfig:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return DataConfig(
        source="jsonl", path=str(path), train_size=train_size, heldout_size=heldout_size, **more
    )


def rows(count):
    return [{"question": f"q{i}", "answer": i, "solution": f"so {i}"} for i in range(count)]


def test_train_and_heldout_share_no_question():
    # 200 distinct problems exist; the task repeats them, so only the check keeps the parts apart.
    train, heldout = load_problems(made(train_size=150, heldout_size=50, task_config=ONE_DIGIT))
    questions = {problem.question for problem in train + heldout}
    assert (len(train), len(heldout), len(questions)) == (150, 50, 200)
    assert all(isinstance(problem.answer, str) for problem in train)


def test_the_seed_decides():
    assert load_problems(made(seed=1)) == load_problems(made(seed=1))
    assert load_problems(made(seed=1)) != load_problems(made(seed=2))


def test_both_parts_are_alike():
    config = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    parts = load_problems(made(train_size=600, heldout_size=300, task_config=config))
    short = [sum(len(p.answer) == 1 for p in part) / len(part) for part in parts]
    assert abs(short[0] - short[1]) < 0.1, short


def test_the_solution_is_the_worked_steps_where_the_task_has_them():
    train, _ = load_problems(made("gsm_symbolic", 5, 1))
    assert all(len(problem.solution) > len(problem.answer) + 10 for problem in train)
    train, _ = load_problems(made())
    assert all(problem.solution.endswith(f" = {problem.answer}") for problem in train)
    train, _ = load_problems(made("letter_counting", 5, 1))
    assert all(problem.solution == problem.answer for problem in train)


def test_balanced_answers():
    config = made(
        "letter_counting",
        train_size=30,
        heldout_size=15,
        task_config={"min_words": 1, "max_words": 3},
        balance_over=["1", "2", "3"],
    )
    train, heldout = load_problems(config)
    assert Counter(problem.answer for problem in train) == {"1": 10, "2": 10, "3": 10}
    assert Counter(problem.answer for problem in heldout) == {"1": 5, "2": 5, "3": 5}
    assert len({problem.question for problem in train + heldout}) == 45
    assert majority_answer(heldout)[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (made("chain_summ"), ["unknown data.task 'chain_summ'", "did you mean chain_sum?"]),
        (made(task_config={"min_term": 1}), ["data.task_config.min_term", "min_terms"]),
        (made(task_config={"size": 1}), ["data.task_config.size"]),
        (made(task_config={"min_terms": 9}), ["does not suit chain_sum", "max_terms"]),
        (made(task_config={"min_terms": "x"}), ["does not suit chain_sum"]),
        (made(train_size=191, task_config=ONE_DIGIT), ["200 distinct problems", "asks for 201"]),
        (made("rush_hour", 1, 1), ["gives no answers"]),
    ],
)
def test_bad_tasks(config, words):
    with pytest.raises(UserError) as error:
        load_problems(config)
    assert all(word in str(error.value) for word in words), error.value


def test_an_answer_that_never_comes():
    config = made(train_size=2, heldout_size=2, balance_over=["three", "3"])
    with pytest.raises(UserError, match=r"gives 0 distinct problems with answer 'three'.*for 2"):
        load_problems(config)


def test_jsonl(tmp_path):
    lines = [*rows(3), "", {"question": "q0", "answer": 9, "solution": "a repeat"}]
    train, heldout = load_problems(jsonl(tmp_path / "p.jsonl", lines))
    assert sorted(train + heldout, key=lambda p: p.id) == [
        Problem(f"p-{i + 1}", f"q{i}", str(i), f"so {i}") for i in range(3)
    ]


def test_jsonl_columns(tmp_path):
    lines = [{"problem": f"q{i}\u2028", "Answer": i} for i in range(3)]
    lines = [json.dumps(line, ensure_ascii=False) for line in lines]
    columns = ColumnsConfig(question="problem", answer="Answer", solution=None)
    train, _ = load_problems(jsonl(tmp_path / "p.jsonl", lines, columns=columns))
    assert all(p.solution == p.answer and p.question.endswith("\u2028") for p in train)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"query": "a", "answer": "b"}], ["line 1", "'question'", "'query', 'answer'"]),
        (
            [*rows(1), {"question": "a", "answer": "b"}],
            ["line 2", "'solution'", "data.columns.solution", "null"],
        ),
        (["", *rows(1), '{"question": '], ["line 3", "not valid JSON"]),
        (["[1, 2]"], ["line 1", "expected an object", "list"]),
        ([{"question": "a", "answer": None, "solution": "c"}], ["line 1", "'answer'", "None"]),
        ([{"question": "", "answer": "b", "solution": "c"}], ["line 1", "'question'"]),
        ([], ["is empty"]),
        (["", "  "], ["is empty"]),
        (rows(2), ["2 distinct problems", "asks for 3"]),
    ],
)
def test_bad_files(tmp_path, lines, words):
    with pytest.raises(UserError) as error:
        load_problems(jsonl(tmp_path / "p.jsonl", lines))
    assert all(word in str(error.value) for word in words), error.value


def test_files_that_cannot_be_read(tmp_path):
    config = jsonl(tmp_path / "p.jsonl", [])
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_problems(config)
    (tmp_path / "p.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read data.path .*p.jsonl: No such file"):
        load_problems(config)
