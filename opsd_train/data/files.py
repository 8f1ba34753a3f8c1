"""Read numbered rows from a JSON, CSV or Parquet file, or from a data set on the hub."""

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from opsd_train.config.errors import UserError
from opsd_train.config.schema import ColumnsConfig, DataConfig

MESSAGES = "messages"
"""Chat column: gives question and solution if the file has no question column."""


@dataclass(frozen=True)
class Row:
    """One row of a data source."""

    id: str  # file or data set name and row number
    place: str  # for error messages, such as "data.jsonl, line 3"
    cells: dict[str, Any]  # by column


def read_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of data.path, one at a time, each with the columns that data.columns names.

    Raises UserError if the file or a row cannot be read, naming the row's number.
    """
    if config.source == "hub":
        return _hub(config)
    path = Path(data_path(config)).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"data.path {shorten_path(path)}: expected a .jsonl, .json, .csv or .parquet file"
        )
    return reader(path, config.columns)


def data_path(config: DataConfig) -> str:
    """data.path of a config with source=file or hub, which DataConfig requires to have one."""
    assert config.path is not None
    return config.path


def is_data_file(name: str) -> bool:
    """Whether `read_rows` has a reader for a file of this name."""
    return Path(name).suffix.lower() in _READERS


def role_columns(present: list[str], columns: ColumnsConfig, place: str) -> dict[str, str]:
    """The column of each role: question, answer, solution, and teacher if problems have one.

    With data.columns.solution=null the solution is the answer. If the question column is missing
    and there is a column `messages`, that gives question and solution, and the answer too if the
    answer column is missing. Raises UserError if a column is missing; `place` begins its message.
    """
    names = {
        "question": columns.question,
        "answer": columns.answer,
        "solution": columns.answer if columns.solution is None else columns.solution,
    }
    if columns.teacher is not None:
        names["teacher"] = columns.teacher
    if MESSAGES in present and columns.question not in present:
        answer = columns.answer if columns.answer in present else MESSAGES
        names |= {"question": MESSAGES, "answer": answer, "solution": MESSAGES}
    for role, column in names.items():
        if column not in present:
            or_null = " (null: use the answer)" if role == "solution" else ""
            raise UserError(
                f"{place}: there is no column {shorten(column)}, only "
                f"{shorten(', '.join(map(repr, present)), quoted=False)}; set data.columns.{role}"
                f"{or_null}"
            )
    return names


def shorten_path(path: Path | str, longest: int = 40) -> str:
    """A path for an error message; the end of it if it is longer than `longest` characters."""
    text = str(path)
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def shorten(value: Any, longest: int = 50, quoted: bool = True) -> str:
    """A value for an error message, as its repr if `quoted`, cut to `longest` characters."""
    text = repr(value) if quoted else str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, without a byte order mark."""
    try:
        with open(path, "rb") as file:  # as bytes: a JSON line may contain U+2028 unescaped
            for number, line in enumerate(file, 1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                try:
                    yield number, line.decode(encoding)
                except UnicodeDecodeError:
                    place = f"{shorten_path(path)}, line {number}"
                    raise UserError(f"{place}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read data.path {shorten_path(path)}: {error.strerror}") from None


def _json_lines(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            place = f"{shorten_path(path)}, line {number}"
            yield _json_row(path, number, place, _parsed(line, place), columns)


def _json(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    """A JSON array of objects; a file that does not start with [ is read as JSON Lines."""
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _json_lines(path, columns)
        return
    whole = "".join(line for _, line in _lines(path))
    for number, cells in enumerate(_parsed(whole, shorten_path(path)), 1):
        yield _json_row(path, number, f"{shorten_path(path)}, row {number}", cells, columns)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f" in line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{place}: not valid JSON ({error.msg}{where})") from None
    except (ValueError, RecursionError) as error:  # 5,000 digits, 10,000 brackets
        raise UserError(f"{place}: cannot read the JSON ({shorten(error, quoted=False)})") from None


def _json_row(path: Path, number: int, place: str, cells: Any, columns: ColumnsConfig) -> Row:
    if not isinstance(cells, dict):
        raise UserError(f"{place}: expected an object with columns, got {type(cells).__name__}")
    role_columns(list(cells), columns, place)
    return Row(f"{path.stem}-{number}", place, cells)


def _csv(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # solutions may exceed the default of 131,072 characters
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                role_columns(header, columns, shorten_path(path))
                continue
            number += 1
            place = f"{shorten_path(path)}, row {number}"
            if len(cells) != len(header):
                raise UserError(f"{place}: {len(cells)} cells, but the header has {len(header)}")
            yield Row(f"{path.stem}-{number}", place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        place = f"{shorten_path(path)}, row {number + 1}"
        raise UserError(f"{place}: not valid CSV ({error})") from None


def _parquet(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    pyarrow = _module("pyarrow", "a .parquet file")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with open(path, "rb") as opened, parquet.ParquetFile(opened) as file:
            place = f"data.path {shorten_path(path)}"
            roles = role_columns(file.schema_arrow.names, columns, place)
            wanted = list(set(roles.values()))
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                for index in range(len(batch)):
                    number += 1
                    place = f"{shorten_path(path)}, row {number}"
                    cells = {name: _cell(batch.column(name)[index], place) for name in wanted}
                    yield Row(f"{path.stem}-{number}", place, cells)
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise UserError(f"cannot read data.path {shorten_path(path)}: {reason}") from None


def _cell(scalar: Any, place: str) -> Any:
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UserError(f"{place}: a cell cannot be read ({_reason(error)})") from None


def _hub(config: DataConfig) -> Iterator[Row]:
    datasets, path = _module("datasets", "data.source=hub"), data_path(config)
    try:
        dataset = datasets.load_dataset(path, config.subset, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path {path} (subset {config.subset}, split {config.split}): {_reason(error)}"
        ) from None
    roles = role_columns(dataset.column_names, config.columns, f"data.path {path}")
    dataset = dataset.select_columns(list(set(roles.values())))
    stem = path.rstrip("/").rpartition("/")[2]
    for number, cells in enumerate(dataset, 1):
        yield Row(f"{stem}-{number}", f"{path}, row {number}", cells)


def _module(name: str, user: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{user} needs: pip install {name}") from None


def _reason(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 120, quoted=False)


_READERS: dict[str, Callable[[Path, ColumnsConfig], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
