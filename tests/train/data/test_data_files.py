"""Files in the variants found in practice; a bad row gives one short line with its number."""

import json
from pathlib import Path

import pytest
import yaml

from opsd_train import cli
from opsd_train.config.errors import UserError
from opsd_train.config.schema import DataConfig
from opsd_train.data.problems import load_problems
from opsd_train.evaluation.sets import load_set
from opsd_train.evaluation.settings import EvalConfig, default_folder
from tests.helpers.tiny import recipe

ROWS = [
    {"question": f"{i} + 1? π\u2028", "answer": f"{i + 1}", "solution": f"so {i + 1}"}
    for i in range(3)
]
WANTED = {(row["question"], row["answer"], row["solution"]) for row in ROWS}


def config(path: Path | str, **more) -> DataConfig:
    return DataConfig(
        source="file", path=str(path), **{"train_size": None, "heldout_size": 0} | more
    )


def texts(path: Path | str, **more) -> set[tuple[str, str, str]]:
    return {(p.question, p.answer, p.solution) for p in load_problems(config(path, **more))[0]}


def lines(rows: list, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def table(rows: list[dict]) -> str:
    cells = [[f'"{text}"' for text in row.values()] for row in rows]
    return "".join(",".join(line) + "\r\n" for line in [[*rows[0]], *cells])


FILES = {
    "a byte order mark": ("d.jsonl", "\ufeff" + lines(ROWS)),
    "Windows line ends": ("d.jsonl", lines(ROWS, "\r\n") + "\r\n"),
    "capital letters": ("d.JSONL", lines(ROWS)),
    "an array": ("d.json", json.dumps(ROWS, indent=2)),
    "an array in one line": ("d.Json", "\ufeff\n" + json.dumps(ROWS)),
    "lines in .json": ("d.json", lines(ROWS)),
    "a table": ("d.csv", table(ROWS)),
    "a table with a mark": ("d.CSV", "\ufeff" + table(ROWS) + "\r\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_variants_of_files(tmp_path: Path, name: str) -> None:
    file, text = FILES[name]
    (tmp_path / file).write_bytes(text.encode())
    assert texts(tmp_path / file) == WANTED
    settings = evaluation("columns.question=question")
    asked = load_set(str(tmp_path / file), settings, None)
    assert {(p.question, p.answer) for p in asked} == {row[:2] for row in WANTED}
    assert default_folder("m", "r", [str(tmp_path / file)]) == "runs/eval-m-r-d"


def evaluation(*overrides: str) -> EvalConfig:
    from opsd_train.config.load import config_from, load_recipe

    return config_from(
        load_recipe("demo/eval", "eval") | {"output_dir": "x"}, overrides, EvalConfig
    )


def test_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_text(lines(ROWS))
    assert texts("~/d.jsonl") == WANTED
    assert len(load_set("~/d.jsonl", evaluation(), None)) == 3


def test_a_long_cell_of_a_table(tmp_path: Path) -> None:
    row = ROWS[0] | {"solution": "a, b\nand c" * 20_000}  # more than csv's own limit
    (tmp_path / "d.csv").write_bytes(table([row]).encode())
    assert texts(tmp_path / "d.csv") == {(row["question"], row["answer"], row["solution"])}


GOOD = json.dumps({"question": "a", "answer": "1", "solution": "s"})
LONG = "x" * 5000
BAD_ROWS = {
    "half a surrogate pair": (
        '{"question": "half an emoji \\ud83d", "answer": "1", "solution": "s"}',
        "'question' has an unpaired surrogate, \\ud83d",
    ),
    "half a surrogate pair in the solution": (
        '{"question": "a", "answer": "1", "solution": "\\udc00"}',
        "'solution' has an unpaired surrogate, \\udc00",
    ),
    "no JSON": ('{"question": "a" "answer"}', "not valid JSON"),
    "many brackets": ("[" * 100_000, "cannot read the JSON"),
    "many digits": ('{"question": ' + "1" * 5000 + "}", "cannot read the JSON"),
    "no object": ('["a"]', "expected an object with columns, got list"),
    "a nested cell": (
        json.dumps({"question": "a", "answer": {"value": [LONG]}, "solution": "s"}),
        "'answer' should be text or a number, got {'value'",
    ),
    "a list": (
        json.dumps({"question": [LONG], "answer": 1, "solution": "s"}),
        "'question' should be text or a number, got ['xxx",
    ),
    "an infinite number": (
        '{"question": "a", "answer": 1e999, "solution": "s"}',
        "'answer' should be text or a number, got inf",
    ),
    "many columns": (
        json.dumps({f"column {i}": "a" for i in range(500)}),
        "no column 'question', only 'column 0'",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_its_number(tmp_path: Path, name: str) -> None:
    row, words = BAD_ROWS[name]
    deep = tmp_path / ("folder " * 10)
    deep.mkdir()
    (deep / "d.jsonl").write_text(f"{GOOD}\n\n{row}\n")
    with pytest.raises(UserError) as error:
        load_problems(config(deep / "d.jsonl"))
    line = f"error: {error.value}"
    assert "d.jsonl, line 3: " in line and words in line and len(line) < 200, line
    if "solution" not in name:  # which an evaluation does not read
        with pytest.raises(UserError, match=r"d\.jsonl, line 3: "):
            load_set(str(deep / "d.jsonl"), evaluation(), None)


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("d.jsonl", GOOD.encode() + b'\n{"question": "\xe9"}\n', "line 2: not UTF-8 text"),
        ("d.csv", b"question,answer,solution\na,b,c\n\xe9,b,c\n", "line 3: not UTF-8 text"),
        (
            "d.csv",
            b"question,answer,solution\na,b,c\na,b\n",
            "row 2: 2 cells, but the header has 3",
        ),
        ("d.csv", b'question,answer,solution\n"a"x,b,c\n', "row 1: not valid CSV"),
        (
            "d.csv",
            b"question;answer;solution\na;b;c\n",
            "no column 'question', only 'question;answer",
        ),
        ("d.csv", b"question,answer,solution\na,,c\n", "row 1: column 'answer' is empty"),
        ("d.csv", b"question,answer,solution\n", "is empty"),
        ("d.json", b'[{"question": "a", "answer": "b"', "not valid JSON"),
        ("d.json", f"[{GOOD},\n 3]".encode(), "row 2: expected an object"),
        ("d.json", b"[]", "is empty"),
    ],
)
def test_bad_tables_and_arrays(tmp_path: Path, file: str, data: bytes, words: str) -> None:
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError) as error:
        load_problems(config(tmp_path / file))
    assert words in str(error.value) and len(str(error.value)) < 190, error.value


def test_a_bad_cell_of_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    write = pytest.importorskip("pyarrow.parquet").write_table
    nested = [{"question": f"q{i}", "answer": {"value": LONG}, "solution": "s"} for i in range(2)]
    write(pyarrow.Table.from_pylist(nested), tmp_path / "d.parquet")
    with pytest.raises(
        UserError, match=r"row 1: column 'answer' should be text .* \{'value'"
    ) as error:
        load_problems(config(tmp_path / "d.parquet"))
    assert len(str(error.value)) < 190
    # Not every writer checks that its text is UTF-8.
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")],
    )
    good = pyarrow.array(["1", "2"])
    made = pyarrow.table({"question": broken, "answer": good, "solution": good})
    write(made, tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"e\.parquet, row 2: a cell cannot be read"):
        load_problems(config(tmp_path / "e.parquet"))


def test_a_bad_row_is_one_line_of_the_command(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "d.jsonl").write_text(f"{GOOD}\n" + BAD_ROWS["half a surrogate pair"][0])
    data = {"source": "file", "path": str(tmp_path / "d.jsonl"), "train_size": None}
    made = recipe(tiny_folder, tmp_path / "run") | {"data": data | {"heldout_size": 0}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    assert cli.main([str(tmp_path / "r.yaml"), "evaluation.problems=0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "line 2" in line and len(line) < 200


# --------------------------------------------------------------------------------- chats


def chat(*turns: tuple[str, object], **more) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]} | more


ASKED = chat(("user", "1 + 1?"), ("assistant", "It is 2."), answer=2)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_chat_is_question_and_solution(tmp_path: Path, suffix: str, capsys) -> None:
    path = tmp_path / f"d{suffix}"
    if suffix == ".jsonl":
        path.write_text(lines([ASKED]))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([ASKED]), path)
    assert texts(path) == {("1 + 1?", "2", "It is 2.")}
    assert capsys.readouterr().err == ""
    (problem,) = load_set(str(path), evaluation(), None)
    assert (problem.question, problem.answer) == ("1 + 1?", "2")


def test_a_chat_without_an_answer_says_what_counts(tmp_path: Path, capsys) -> None:
    rows = [chat(("user", f"{i} + 1?"), ("assistant", f"It is {i + 1}.")) for i in range(3)]
    (tmp_path / "d.jsonl").write_text(lines(rows))
    assert ("1 + 1?", "It is 2.", "It is 2.") in texts(tmp_path / "d.jsonl")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no column 'answer'; the assistant's whole turn" in said


def test_a_question_column_goes_before_a_chat(tmp_path: Path) -> None:
    row = ASKED | {"question": "q", "answer": "a", "solution": "s"}
    (tmp_path / "d.jsonl").write_text(lines([row]))
    assert texts(tmp_path / "d.jsonl") == {("q", "a", "s")}


OTHER_CHATS = {
    "a system turn": chat(("system", "Add."), ("user", "q"), ("assistant", "s"), answer=1),
    "a chat that is not one user turn and its answer": chat(
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), answer=1
    ),
    "an empty 'messages'": chat(("user", "q"), ("assistant", " "), answer=1),
    "an empty 'answer'": chat(("user", "q"), ("assistant", "s"), answer=float("nan")),
}


@pytest.mark.parametrize("fault", OTHER_CHATS)
def test_other_chats_are_refused_or_counted(tmp_path: Path, fault: str, capsys) -> None:
    (tmp_path / "d.jsonl").write_text(lines([ASKED, OTHER_CHATS[fault]]))
    with pytest.raises(UserError, match=r"d\.jsonl, line 2: .*data\.incomplete=skip") as error:
        texts(tmp_path / "d.jsonl")
    assert len(str(error.value)) < 190
    assert texts(tmp_path / "d.jsonl", incomplete="skip") == {("1 + 1?", "2", "It is 2.")}
    assert capsys.readouterr().err.endswith(f"with {fault}: 1\n")


def test_chats_that_are_none(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": LONG}]
    for row, words in (
        ({"messages": LONG, "answer": 1}, "'messages' should be a list of turns"),
        (chat(("user", parts), ("assistant", "s"), answer=1), "should be text or a number, got [{"),
    ):
        (tmp_path / "d.jsonl").write_text(lines([row]))
        with pytest.raises(UserError) as error:
            texts(tmp_path / "d.jsonl")
        assert words in str(error.value) and len(str(error.value)) < 190
