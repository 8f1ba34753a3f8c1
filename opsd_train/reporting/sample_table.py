"""Sample completions for people: the text of each token, and a table for the terminal."""

import heapq
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

LONGEST_CELL = 200
MOST_MARKED = 10
BROKEN = "\ufffd"

Rows = list[dict[str, Any]]
Pieces = list[list[Any]]


def token_pieces(tokenizer: Any, tokens: Sequence[int], values: Sequence[float]) -> Pieces:
    """[text, value] per token, special tokens included; the texts joined are the whole text.

    Tokens that only together make a character are one piece, with the largest of their values.
    """
    pieces: Pieces = []
    context = start = 0
    for end in range(1, len(tokens) + 1):
        # With the piece before it, because some tokenizers drop the space a text starts with.
        known = tokenizer.decode(tokens[context:start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(tokens[context:end], clean_up_tokenization_spaces=False)
        text = text[len(known) :]
        half = not text or text.endswith(BROKEN)
        # UTF-8 has at most 4 bytes a character: what 4 tokens do not complete is no character.
        if half and end - start < 4 and end < len(tokens):
            continue
        pieces.append([text, round(max(values[start:end]), 4)])
        context, start = (end if half else start), end
    return pieces


def largest(pieces: Pieces) -> set[int]:
    """Indices of the pieces to mark: a twentieth of them, those with the largest values above 0."""
    count = min(MOST_MARKED, -(-len(pieces) // 20))
    known = [i for i, (_, value) in enumerate(pieces) if value is not None and value > 0]
    return set(heapq.nlargest(count, known, key=lambda index: pieces[index][1]))


def sample_table(step: int, rows: Rows) -> Table:
    """Completions with their largest tokens marked."""
    name = "divergence" if any("divergence" in row for row in rows) else "nll"
    table = Table(title=f"step {step}", show_lines=True, title_justify="left")
    for column in ("question", "completion", "answer"):
        table.add_column(column, overflow="fold")
    table.add_column("right")
    table.add_column(name, justify="right")
    for row in rows:
        value = row.get(name)
        table.add_row(
            _cell([[row["question"], None]]),
            _cell(row.get("tokens") or [[row["completion"], None]]),
            _cell([[row["answer"], None]]),
            _verdict(row["correct"]),
            "" if value is None else f"{value:.4f}",
        )
    return table


def _verdict(correct: bool | None) -> Text:
    if correct is None:
        return Text("-")
    return Text("yes", "green") if correct else Text("no", "red")


def _cell(pieces: Pieces) -> Text:
    """A model's text for the terminal: cut, never read as markup, no control characters."""
    marked, cell = largest(pieces), Text()
    for index, (text, _) in enumerate(pieces):
        clean = "".join(c if c.isprintable() or c == "\n" else BROKEN for c in text)
        cell.append(clean, "bold underline magenta" if index in marked else None)
    if len(cell) > LONGEST_CELL:
        cell = cell[: LONGEST_CELL - 1].append("…")
    return cell
