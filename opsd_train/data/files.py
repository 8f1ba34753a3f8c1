"""Rows of a JSON, CSV or Parquet file or a data set of the hub, each with its number."""

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
"""Column of a chat: it gives question and solution where the file has no question column."""


@dataclass(frozen=True)
class Row:
    """One row, and where it stands for error messages."""

    id: str
    place: str
    cells: dict[str, Any]


def read_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of data.path, one at a time, with at least the columns that data.columns names.

    Raises UserError for a file or a row that cannot be read; it names the row by its number.
    """
    if config.source == "hub":
        return _hub(config)
    path = data_file(config.path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data.path {shown(path)}: expected a .jsonl, .json, .csv or .parquet file")
    return reader(path, config.columns)


def data_file(path: str) -> Path:
    """The file of this name; `~` is the home folder."""
    return Path(path).expanduser()


def is_data_file(name: str) -> bool:
    """Whether `read_rows` has a reader for a file of this name."""
    return Path(name).suffix.lower() in _READERS


def role_columns(present: list[str], columns: ColumnsConfig, place: str) -> dict[str, str]:
    """The column of each role: question, answer, solution.

    Without a column for the solution, the answer stands in for it. A `messages` column stands in
    for a question column that is not there; it is the solution too, and the answer if none else is.
    """
    names = {
        "question": columns.question,
        "answer": columns.answer,
        "solution": columns.answer if columns.solution is None else columns.solution,
    }
    if MESSAGES in present and columns.question not in present:
        answer = columns.answer if columns.answer in present else MESSAGES
        return {"question": MESSAGES, "answer": answer, "solution": MESSAGES}
    for role, column in names.items():
        if column not in present:
            or_null = " (or null: the answer)" if role == "solution" else ""
            raise UserError(
                f"{place}: there is no column {short(column)}, only "
                f"{short(', '.join(map(repr, present)), quoted=False)}; set data.columns.{role}"
                f"{or_null}"
            )
    return names


def shown(path: Path | str, longest: int = 40) -> str:
    """A path for an error message, its end where it is long."""
    text = str(path)
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def short(value: Any, longest: int = 50, quoted: bool = True) -> str:
    """A value for an error message: its beginning where it is long."""
    text = repr(value) if quoted else str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; a byte order mark is no part of the text."""
    try:
        with open(path, "rb") as file:  # binary: JSON may hold U+2028 and its like unescaped
            for number, line in enumerate(file, 1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                try:
                    yield number, line.decode(encoding)
                except UnicodeDecodeError:
                    raise UserError(f"{shown(path)}, line {number}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read data.path {shown(path)}: {error.strerror}") from None


def _json_lines(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            place = f"{shown(path)}, line {number}"
            yield _json_row(path, number, place, _parsed(line, place), columns)


def _json(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    """An array of objects; a file that does not begin with one is read as JSON Lines."""
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _json_lines(path, columns)
        return
    whole = "".join(line for _, line in _lines(path))
    for number, cells in enumerate(_parsed(whole, shown(path)), 1):
        yield _json_row(path, number, f"{shown(path)}, row {number}", cells, columns)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f" in line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{place}: not valid JSON ({error.msg}{where})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 10,000 brackets
        raise UserError(f"{place}: cannot read the JSON ({short(error, quoted=False)})") from None


def _json_row(path: Path, number: int, place: str, cells: Any, columns: ColumnsConfig) -> Row:
    if not isinstance(cells, dict):
        raise UserError(f"{place}: expected an object with columns, got {type(cells).__name__}")
    role_columns(list(cells), columns, place)
    return Row(f"{path.stem}-{number}", place, cells)


def _csv(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # solutions may be longer than its 131,072 characters
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                role_columns(header, columns, shown(path))
                continue
            number += 1
            place = f"{shown(path)}, row {number}"
            if len(cells) != len(header):
                raise UserError(f"{place}: {len(cells)} cells, but the header has {len(header)}")
            yield Row(f"{path.stem}-{number}", place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{shown(path)}, row {number + 1}: not valid CSV ({error})") from None


def _parquet(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    pyarrow = _module("pyarrow", "a .parquet file")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with open(path, "rb") as opened, parquet.ParquetFile(opened) as file:
            roles = role_columns(file.schema_arrow.names, columns, f"data.path {shown(path)}")
            wanted = list(set(roles.values()))
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                for index in range(len(batch)):
                    number += 1
                    place = f"{shown(path)}, row {number}"
                    cells = {name: _cell(batch.column(name)[index], place) for name in wanted}
                    yield Row(f"{path.stem}-{number}", place, cells)
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise UserError(f"cannot read data.path {shown(path)}: {reason}") from None


def _cell(scalar: Any, place: str) -> Any:
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UserError(f"{place}: a cell cannot be read ({_reason(error)})") from None


def _hub(config: DataConfig) -> Iterator[Row]:
    datasets = _module("datasets", "data.source=hub")
    try:
        dataset = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path {config.path} (subset {config.subset}, split {config.split}): "
            f"{_reason(error)}"
        ) from None
    roles = role_columns(dataset.column_names, config.columns, f"data.path {config.path}")
    dataset = dataset.select_columns(list(set(roles.values())))
    stem = config.path.rstrip("/").rpartition("/")[2]
    for number, cells in enumerate(dataset, 1):
        yield Row(f"{stem}-{number}", f"{config.path}, row {number}", cells)


def _module(name: str, user: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{user} needs: pip install {name}") from None


def _reason(error: Exception) -> str:
    return short(" ".join(str(error).split()), 120, quoted=False)


_READERS: dict[str, Callable[[Path, ColumnsConfig], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
