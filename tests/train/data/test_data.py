"""Problems are distinct and split without overlap; bad sources give clear errors."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from opsd_train.config.errors import UserError
from opsd_train.config.schema import ColumnsConfig, DataConfig
from opsd_train.data.problems import Problem, load_problems, majority_answer

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def made(task="chain_sum", train_size=20, heldout_size=10, **more) -> DataConfig:
    return DataConfig(
        source="reasoning_gym", task=task, train_size=train_size, heldout_size=heldout_size, **more
    )


def jsonl(path, lines, train_size=2, heldout_size=1, **more) -> DataConfig:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return DataConfig(
        source="file", path=str(path), train_size=train_size, heldout_size=heldout_size, **more
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
        (
            [*rows(1), {"question": "a", "answer": None, "solution": "c"}],
            ["line 2", "'answer' is empty", "data.incomplete=skip"],
        ),
        ([{"question": " ", "answer": "b", "solution": "c"}], ["line 1", "'question' is empty"]),
        ([{"question": "a", "answer": True, "solution": "c"}], ["line 1", "'answer'", "True"]),
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


# The columns of siyanzhao/Openthoughts_math_30k_opsd that matter, and one that does not.
OPENTHOUGHTS = ColumnsConfig(question="problem", answer="Answer", solution="solution")


def openthoughts(count):
    return [
        {"problem": f"p{i}", "solution": f"s{i}", "Answer": f"\\frac{{{i}}}{{7}}", "source": "x"}
        for i in range(count)
    ]


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def of_columns(source, path, train_size=None, heldout_size=1, **more) -> DataConfig:
    return DataConfig(
        source=source,
        path=path,
        columns=OPENTHOUGHTS,
        train_size=train_size,
        heldout_size=heldout_size,
        **more,
    )


def expected(stem, numbers):
    return [Problem(f"{stem}-{i + 1}", f"p{i}", f"\\frac{{{i}}}{{7}}", f"s{i}") for i in numbers]


def by_number(problems):
    return sorted(problems, key=lambda problem: int(problem.id.rpartition("-")[2]))


def test_parquet_with_the_columns_of_openthoughts(tmp_path):
    # More than one batch of rows.
    path = parquet(tmp_path / "math.parquet", openthoughts(2100))
    train, heldout = load_problems(of_columns("file", path, heldout_size=10))
    assert (len(train), len(heldout)) == (2090, 10)
    assert by_number(train + heldout) == expected("math", range(2100))
    assert len(load_problems(of_columns("file", path, train_size=7))[0]) == 7


def test_rows_with_an_empty_cell(tmp_path, capsys):
    cells = openthoughts(5)
    cells[1]["Answer"], cells[2]["solution"], cells[3]["Answer"] = None, "  ", ""
    path = parquet(tmp_path / "math.parquet", cells)
    with pytest.raises(UserError, match=r"math.parquet, row 2: column 'Answer' is empty.*skip"):
        load_problems(of_columns("file", path))
    train, heldout = load_problems(of_columns("file", path, incomplete="skip"))
    assert by_number(train + heldout) == expected("math", [0, 4])
    told = capsys.readouterr().err
    assert "an empty 'Answer': 2\n" in told and "an empty 'solution': 1\n" in told
    with pytest.raises(UserError, match=r"gives 2 distinct.*heldout_size=2 leaves none"):
        load_problems(of_columns("file", path, heldout_size=2, incomplete="skip"))


NAN = float("nan")


@pytest.mark.parametrize("column", ["question", "answer", "solution"])
def test_nan_is_an_empty_cell(tmp_path, column, capsys):
    """pandas writes missing values as NaN, in JSON too."""
    lines = [
        *rows(3),
        rows(1)[0] | {column: NAN},
        {**rows(1)[0], "question": "nan", "answer": "nan"},
    ]
    with pytest.raises(UserError, match=rf"p\.jsonl, line 4: column '{column}' is empty"):
        load_problems(jsonl(tmp_path / "p.jsonl", lines))
    config = jsonl(tmp_path / "p.jsonl", lines, None, 1, incomplete="skip")
    train, heldout = load_problems(config)
    assert sorted(p.question for p in train + heldout) == ["nan", "q0", "q1", "q2"]  # text stays
    assert f"an empty '{column}': 1\n" in capsys.readouterr().err


def test_nan_and_null_in_a_column_of_numbers(tmp_path, capsys):
    cells = [
        {"problem": f"p{i}", "solution": f"s{i}", "Answer": x}
        for i, x in enumerate([1.5, NAN, None])
    ]
    path = parquet(tmp_path / "math.parquet", cells)
    train, _ = load_problems(of_columns("file", path, heldout_size=0, incomplete="skip"))
    assert [p.answer for p in train] == ["1.5"]
    assert "an empty 'Answer': 2\n" in capsys.readouterr().err


def test_repeated_questions_are_counted_and_contradictions_named(tmp_path, capsys):
    lines = [{"question": f"q{i % 10}", "answer": i % 20, "solution": "s"} for i in range(30)]
    train, _ = load_problems(jsonl(tmp_path / "p.jsonl", lines, None, 0))
    assert {(p.question, p.answer) for p in train} == {(f"q{i}", str(i)) for i in range(10)}
    first, second = capsys.readouterr().err.splitlines()
    assert "skipped: 20 of 30 rows of data.path" in first and "p.jsonl repeat a question" in first
    assert "10 of these rows contradict" in second and "'0' in p-1 and '10' in p-11" in second
    load_problems(jsonl(tmp_path / "p.jsonl", rows(9), None, 3))
    assert capsys.readouterr().err == ""


SAME = {
    "a space at the end": "What is {} + 1? ",
    "other white space": " What\tis\n{}  +\u00a01?",
    "other case": "WHAT IS {} + 1?",
    "full width": "What is {} \uff0b 1\uff1f",
}


@pytest.mark.parametrize("other", SAME.values(), ids=SAME)
def test_the_same_question_is_not_on_both_sides(tmp_path, other):
    questions = [form.format(i) for i in range(40) for form in ("What is {} + 1?", other)]
    lines = [{"question": q, "answer": n // 2, "solution": "s"} for n, q in enumerate(questions)]
    train, heldout = load_problems(jsonl(tmp_path / "p.jsonl", lines, None, 10))
    assert len(heldout) == 10 and len(train) == 30
    answers = [{p.answer for p in part} for part in (train, heldout)]
    assert not answers[0] & answers[1]
    assert all(p.question.startswith("What is ") for p in train + heldout)  # the first is kept


def test_composed_letters_are_the_same_and_powers_are_not(tmp_path):
    questions = ["caf\u00e9", "cafe\u0301", "What is 5\u00b2?", "What is 52?", "H\u2082O", "H2O"]
    lines = [{"question": q, "answer": n, "solution": "s"} for n, q in enumerate(questions)]
    train, _ = load_problems(jsonl(tmp_path / "p.jsonl", lines, None, 0))
    assert {p.answer for p in train} == {"0", "2", "3", "4", "5"}


def test_a_task_may_ask_about_capital_letters():
    config = {"min_words": 1, "max_words": 1}
    train, _ = load_problems(made("letter_counting", 300, 0, task_config=config))
    assert len({p.question.casefold() for p in train}) < len({p.question for p in train}) == 300


def test_a_part_of_a_file_is_drawn_from_all_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    part, heldout = load_problems(jsonl(path, rows(1000), 100, 50, seed=1))
    everything, same = load_problems(jsonl(path, rows(1000), None, 50, seed=1))
    assert (len(part), len(heldout), len(everything)) == (100, 50, 950)
    assert set(heldout) == set(same) and set(part) <= set(everything)
    numbers = sorted(int(p.answer) for p in part)
    # Uniform on 0 to 999: the mean of 100 is within 5 standard errors (145) of 499.5.
    assert abs(sum(numbers) / 100 - 499.5) < 145 and numbers[-1] > 900
    assert load_problems(jsonl(path, rows(1000), 100, 50, seed=2))[0] != part


def test_parquet_that_does_not_fit(tmp_path):
    path = parquet(tmp_path / "math.parquet", [{"problem": "p", "answer": "a"}])
    with pytest.raises(UserError, match=r"no column 'Answer', only 'problem', 'answer'; set data"):
        load_problems(of_columns("file", path))
    (tmp_path / "bad.parquet").write_text("no parquet")
    for name, reason in (("bad.parquet", "Parquet"), ("no.parquet", "No such file")):
        with pytest.raises(UserError, match=rf"cannot read data.path .*{name}: .*{reason}"):
            load_problems(of_columns("file", str(tmp_path / name)))
    with pytest.raises(UserError, match=r"expected a \.jsonl, \.json, \.csv or \.parquet file"):
        load_problems(of_columns("file", str(tmp_path / "p.xlsx")))


class FakeSet(list):
    """The part of datasets.Dataset that the reader uses."""

    column_names = property(lambda self: list(self[0]))

    def select_columns(self, columns):
        return FakeSet({name: row[name] for name in columns} for row in self)


@pytest.mark.parametrize("real", [True, False])
def test_hub(tmp_path, monkeypatch, real):
    asked = []
    if real:
        load = pytest.importorskip("datasets").load_dataset
        path = parquet(tmp_path / "train.parquet", openthoughts(6))

        def load_dataset(name, subset, split):
            asked.append((name, subset, split))
            return load("parquet", data_files=path, split=split, cache_dir=tmp_path / "cache")

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
    else:

        def load_dataset(name, subset, split):
            asked.append((name, subset, split))
            return FakeSet(openthoughts(6))

        fake_datasets(monkeypatch, load_dataset)
    config = of_columns("hub", "siyanzhao/Openthoughts_math_30k_opsd", heldout_size=2)
    train, heldout = load_problems(config)
    assert asked == [("siyanzhao/Openthoughts_math_30k_opsd", None, "train")]
    assert by_number(train + heldout) == expected("Openthoughts_math_30k_opsd", range(6))
    assert len(heldout) == 2


def fake_datasets(monkeypatch, load_dataset):
    errors = SimpleNamespace(DatasetsError=LookupError)
    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", fake)


@pytest.mark.parametrize("error", [ConnectionError, ValueError, LookupError])
def test_hub_out_of_reach(monkeypatch, error):
    def load_dataset(name, subset, split):
        raise error("Couldn't reach it\nat all")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"data.path a/b \(subset None, split test\): .*it at all"):
        load_problems(of_columns("hub", "a/b", split="test"))


@pytest.mark.parametrize("source", ["hub", "file"])
def test_a_package_that_is_not_there(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install (datasets|pyarrow)"):
        load_problems(of_columns(source, "x.parquet"))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"train_size": None}, "needs data.train_size"),
        ({"task": None}, "needs data.task"),
        (
            {"source": "file", "path": "x", "train_size": None, "balance_over": ["1"]},
            "balance_over",
        ),
        ({"source": "hub"}, "needs data.path"),
    ],
)
def test_keys_that_belong_together(more, reason):
    keys = {"source": "reasoning_gym", "task": "a", "train_size": 1, "heldout_size": 1}
    with pytest.raises(ValueError, match=reason):
        DataConfig(**keys | more)
