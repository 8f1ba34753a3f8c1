"""From rows to the texts of problems: empty cells, cells that are no text, chats."""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from opsd_train.config.errors import UserError
from opsd_train.config.schema import DataConfig
from opsd_train.data.files import MESSAGES, Row, read_rows, role_columns, short, shown

Texts = dict[str, str]  # by role: question, answer, solution


class Fault(NamedTuple):
    """Why a row gives no problem: of this row, and of all rows that have it."""

    here: str
    counted: str


def texts_from_rows(config: DataConfig, incomplete: Counter[str]) -> Iterator[tuple[str, Texts]]:
    """Row ids and texts of the complete rows.

    The others are an error, or with data.incomplete=skip counted in `incomplete` by what is wrong
    with them. Raises UserError naming the row for a cell that is neither text nor a number.
    """
    path, noted, row = shown(config.path), False, None
    for row in read_rows(config):
        columns = role_columns(list(row.cells), config.columns, row.place)
        if columns["answer"] == MESSAGES and not noted:
            noted = True
            print(
                f"note: data.path {path} has no column {short(config.columns.answer)}; the "
                "assistant's whole turn counts as the answer",
                file=sys.stderr,
            )
        cells = {role: row.cells[column] for role, column in columns.items()}
        if columns["question"] == MESSAGES:
            found = _of_chat(row, columns, cells)
        else:
            found = _of_cells(row, columns, cells)
        if not isinstance(found, Fault):
            yield row.id, found
        elif config.incomplete == "error":
            raise UserError(
                f"{row.place}: {found.here}; mend it, or leave such rows out: data.incomplete=skip"
            )
        else:
            incomplete[found.counted] += 1
    if row is None:
        raise UserError(f"data.path {path} is empty")


def _of_cells(row: Row, columns: dict[str, str], cells: dict[str, Any]) -> Texts | Fault:
    """`cells` by role."""
    for role, column in columns.items():
        if _is_empty(cells[role]):
            return Fault(f"column {short(column)} is empty", f"an empty {short(column)}")
    return {role: _text(row.place, column, cells[role]) for role, column in columns.items()}


def _of_chat(row: Row, columns: dict[str, str], cells: dict[str, Any]) -> Texts | Fault:
    """The user's turn is the question, the assistant's the solution."""
    turns = cells["question"]
    if _is_empty(turns):
        return Fault(f"column {MESSAGES!r} is empty", f"an empty {MESSAGES!r}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            f"{row.place}: column {MESSAGES!r} should be a list of turns with role and content, "
            f"got {short(turns)}"
        )
    roles = [turn.get("role") for turn in turns]
    if "system" in roles:
        return Fault("its chat has a system turn; prompts.system sets one for all", "a system turn")
    if roles != ["user", "assistant"]:
        return Fault(
            f"its chat is {short(roles, 30)}, not one user turn and its answer",
            "a chat that is not one user turn and its answer",
        )
    question, solution = (turn.get("content") for turn in turns)
    answer = solution if columns["answer"] == MESSAGES else cells["answer"]
    columns = {"question": MESSAGES, "answer": columns["answer"], "solution": MESSAGES}
    texts = {"question": question, "answer": answer, "solution": solution}
    return _of_cells(row, columns, texts)


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; pandas writes a missing value as NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(place: str, column: str, value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (number and math.isfinite(value)):
        raise UserError(
            f"{place}: column {short(column)} should be text or a number, got {short(value)}"
        )
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell what no text file can hold
            half = text[error.start].encode("ascii", "backslashreplace").decode()
            raise UserError(
                f"{place}: column {short(column)} has half a character, {half}; write it whole"
            ) from None
    return text
