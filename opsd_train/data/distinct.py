"""Find rows that repeat a question, and those among them with another answer."""

import unicodedata
from collections.abc import Callable, Iterator
from hashlib import blake2b

from opsd_train.data.files import shorten


class DuplicateFilter:
    """Keeps the first of the questions that are equal in a normal form, and counts the others.

    `rows`, `repeats` and `contradictions` count the questions seen, those that repeat an earlier
    one, and those of them whose answer differs from the first one's.
    """

    def __init__(self, normalise: Callable[[str], str]) -> None:
        self._normalise = normalise
        self.rows = 0
        self.repeats = 0
        self.contradictions = 0
        self._example = ""
        self._first: dict[bytes, tuple[str, str]] = {}  # id and answer of each distinct question

    def add(self, name: str, question: str, answer: str) -> bool:
        """Count a question with the id `name`; returns whether it is new."""
        self.rows += 1
        own = (name, answer)
        first = self._first.setdefault(self._key(question), own)
        if first is own:
            return True
        self.repeats += 1
        if normal_form(first[1]) != normal_form(answer):
            self.contradictions += 1
            pair = " and ".join(f"{shorten(given, 24)} in {row}" for row, given in (first, own))
            self._example = self._example or pair
        return False

    def _key(self, question: str) -> bytes:
        """A 16-byte digest instead of the text, since there may be millions."""
        return blake2b(self._normalise(question).encode(), digest_size=16).digest()

    def lines(self, source: str) -> Iterator[str]:
        """Messages for the user about the repeats in `source`, one line each."""
        if self.repeats:
            yield (
                f"skipped: {self.repeats} of {self.rows} rows of {source} repeat a question; the "
                "first row of each is kept"
            )
        if self.contradictions:
            yield (
                f"warning: {self.contradictions} of these rows contradict the first row's answer "
                f"(for example {self._example})"
            )


def normal_form(text: str) -> str:
    """The text in Unicode form NFKC, case-folded, with white space collapsed to single spaces."""
    if not text.isascii():
        # NFKC alone turns 5² into 52, a different number.
        text = unicodedata.normalize("NFKC", "".join(map(_with_position, text)))
    return " ".join(text.casefold().split())


def _with_position(character: str) -> str:
    """The character, after ^ if it is a superscript and _ if it is a subscript."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return {"<super>": "^", "<sub>": "_"}.get(kind, "") + character
