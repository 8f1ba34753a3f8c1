"""Sample completions: the text and value of each token, and a table for the terminal."""

import heapq
import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

MAX_CELL = 200  # characters
MAX_MARKED = 10  # tokens of a completion
REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character

Rows = list[dict[str, Any]]
Pieces = list[list[Any]]  # [text, value] each


def token_pieces(tokenizer: Any, tokens: Sequence[int], values: Sequence[float]) -> Pieces:
    """[text, value] per token, special tokens included; the texts joined give the whole text.

    Tokens that make a character only together are one piece, with the largest of their values. A
    token whose value is NaN has none: null.
    """
    pieces: Pieces = []
    context = start = 0
    for end in range(1, len(tokens) + 1):
        # Decoded with the piece before: some tokenizers drop the space at the start of a text.
        before = tokenizer.decode(tokens[context:start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(tokens[context:end], clean_up_tokenization_spaces=False)
        text = text[len(before) :]
        incomplete = not text or text.endswith(REPLACEMENT)
        # UTF-8 has at most 4 bytes per character: what 4 tokens do not complete is none.
        if incomplete and end - start < 4 and end < len(tokens):
            continue
        known = [value for value in values[start:end] if not math.isnan(value)]
        pieces.append([text, round(max(known), 4) if known else None])
        context, start = (end if incomplete else start), end
    return pieces


def largest(pieces: Pieces) -> set[int]:
    """Indices of the pieces to mark: the twentieth with the largest values, if above 0."""
    count = min(MAX_MARKED, -(-len(pieces) // 20))
    positive = [i for i, (_, value) in enumerate(pieces) if value is not None and value > 0]
    return set(heapq.nlargest(count, positive, key=lambda index: pieces[index][1]))


def sample_table(step: int, rows: Rows) -> Table:
    """A table of completions; the tokens with the largest values are marked."""
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
    """Model text for the terminal: truncated, without markup or control characters."""
    marked, cell = largest(pieces), Text()
    for index, (text, _) in enumerate(pieces):
        clean = "".join(c if c.isprintable() or c == "\n" else REPLACEMENT for c in text)
        cell.append(clean, "bold underline magenta" if index in marked else None)
    if len(cell) > MAX_CELL:
        cell = cell[: MAX_CELL - 1].append("…")
    return cell
