"""Turn rows into the texts of problems; find empty cells, cells that are not text, and chats."""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from opsd_train.config.errors import UserError
from opsd_train.config.schema import DataConfig
from opsd_train.data.files import (
    MESSAGES,
    Row,
    data_path,
    read_rows,
    role_columns,
    shorten,
    shorten_path,
)

Texts = dict[str, str]
"""The texts of a problem by role: question, answer, solution, and teacher if it has one."""


class Fault(NamedTuple):
    """Why a row gives no problem."""

    message: str  # about this row
    group: str  # the kind of fault, under which skipped rows are counted


def texts_from_rows(config: DataConfig, incomplete: Counter[str]) -> Iterator[tuple[str, Texts]]:
    """Row ids and texts of the complete rows.

    Incomplete rows are counted in `incomplete` by their fault with data.incomplete=skip. Otherwise
    the first one raises UserError, as does any cell that is neither text nor a number.
    """
    path, noted, row = shorten_path(data_path(config)), False, None
    for row in read_rows(config):
        columns = role_columns(list(row.cells), config.columns, row.place)
        if columns["answer"] == MESSAGES and not noted:
            noted = True
            print(
                f"note: data.path {path} has no column {shorten(config.columns.answer)}; the "
                "assistant's whole turn counts as the answer",
                file=sys.stderr,
            )
        cells = {role: row.cells[column] for role, column in columns.items()}
        if columns["question"] == MESSAGES:
            texts = _texts_of_chat(row, columns, cells)
        else:
            texts = _texts_of_cells(row, columns, cells)
        if not isinstance(texts, Fault):
            yield row.id, texts
        elif config.incomplete == "error":
            raise UserError(
                f"{row.place}: {texts.message}; fix it, or skip such rows: data.incomplete=skip"
            )
        else:
            incomplete[texts.group] += 1
    if row is None:
        raise UserError(f"data.path {path} is empty")


def _texts_of_cells(row: Row, columns: dict[str, str], cells: dict[str, Any]) -> Texts | Fault:
    """Texts from `cells`; both by role, as is `columns`, which names them in messages."""
    for role, column in columns.items():
        if _is_empty(cells[role]):
            return Fault(f"column {shorten(column)} is empty", f"an empty {shorten(column)}")
    return {role: _text(row.place, column, cells[role]) for role, column in columns.items()}


def _texts_of_chat(row: Row, columns: dict[str, str], cells: dict[str, Any]) -> Texts | Fault:
    """The user's turn becomes the question, the assistant's the solution."""
    turns = cells["question"]
    if _is_empty(turns):
        return Fault(f"column {MESSAGES!r} is empty", f"an empty {MESSAGES!r}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            f"{row.place}: column {MESSAGES!r} should be a list of turns with role and content, "
            f"got {shorten(turns)}"
        )
    roles = [turn.get("role") for turn in turns]
    if "system" in roles:
        return Fault("its chat has a system turn; prompts.system sets one for all", "a system turn")
    if roles != ["user", "assistant"]:
        return Fault(
            f"its chat is {shorten(roles, 30)}, not one user turn and its answer",
            "a chat that is not one user turn and its answer",
        )
    question, solution = (turn.get("content") for turn in turns)
    answer = solution if columns["answer"] == MESSAGES else cells["answer"]
    texts = cells | {"question": question, "answer": answer, "solution": solution}
    return _texts_of_cells(row, columns, texts)


def _is_empty(value: Any) -> bool:
    """Whether a cell is null, blank or NaN, which pandas writes for a missing value."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(place: str, column: str, value: Any) -> str:
    """The cell as text; UserError if it is neither text nor a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (number and math.isfinite(value)):
        raise UserError(
            f"{place}: column {shorten(column)} should be text or a number, got {shorten(value)}"
        )
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
            half = text[error.start].encode("ascii", "backslashreplace").decode()
            raise UserError(
                f"{place}: column {shorten(column)} has an unpaired surrogate, {half}; remove it"
            ) from None
    return text
