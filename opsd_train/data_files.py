"""Rows of a JSON Lines file, a Parquet file or a data set of the hub."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from opsd_train.errors import UserError
from opsd_train.sections import ColumnsConfig, DataConfig


@dataclass(frozen=True)
class Row:
    """One row, and where it stands for error messages."""

    id: str
    place: str
    cells: dict[str, Any]


def read_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of data.path, one at a time, with at least the columns that data.columns names."""
    if config.source == "hub":
        return _hub(config)
    path = Path(config.path)
    if path.suffix == ".jsonl":
        return _json_lines(path, config.columns)
    if path.suffix == ".parquet":
        return _parquet(path, config.columns)
    raise UserError(f"data.path {path}: expected a .jsonl or .parquet file")


def column_names(columns: ColumnsConfig) -> dict[str, str]:
    """The column of each role; without one for the solution, the answer stands in for it."""
    return {
        "question": columns.question,
        "answer": columns.answer,
        "solution": columns.answer if columns.solution is None else columns.solution,
    }


def _json_lines(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    try:
        # newline="\n": JSON text may hold U+2028 and its like unescaped.
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield Row(f"{path.stem}-{number}", place, _json_object(line, place, columns))
    except OSError as error:
        raise UserError(f"cannot read data.path {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"data.path {path} is not UTF-8 text") from None


def _json_object(line: str, place: str, columns: ColumnsConfig) -> dict[str, Any]:
    try:
        cells = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg})") from None
    if not isinstance(cells, dict):
        raise UserError(f"{place}: expected an object with columns, got {type(cells).__name__}")
    _check_columns(list(cells), columns, place)
    return cells


def _parquet(path: Path, columns: ColumnsConfig) -> Iterator[Row]:
    pyarrow = _module("pyarrow", "a .parquet file")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns, f"data.path {path}")
            wanted = list(set(column_names(columns).values()))
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.stem}-{number}", f"{path}, row {number}", cells)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read data.path {path}: {_one_line(error)}") from None


def _hub(config: DataConfig) -> Iterator[Row]:
    datasets = _module("datasets", "data.source=hub")
    try:
        dataset = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path {config.path} (subset {config.subset}, split {config.split}): "
            f"{_one_line(error)}"
        ) from None
    _check_columns(dataset.column_names, config.columns, f"data.path {config.path}")
    dataset = dataset.select_columns(list(set(column_names(config.columns).values())))
    stem = config.path.rstrip("/").rpartition("/")[2]
    for number, cells in enumerate(dataset, 1):
        yield Row(f"{stem}-{number}", f"{config.path}, row {number}", cells)


def _check_columns(present: list[str], columns: ColumnsConfig, place: str) -> None:
    for role, column in column_names(columns).items():
        if column not in present:
            or_null = " (null: show the teacher the answer)" if role == "solution" else ""
            raise UserError(
                f"{place}: there is no column {column!r}, only {', '.join(map(repr, present))}; "
                f"set data.columns.{role}{or_null}"
            )


def _module(name: str, user: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{user} needs: pip install {name}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
