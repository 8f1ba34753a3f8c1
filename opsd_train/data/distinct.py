"""Which questions are the same, and what the rows that repeat one answer."""

import unicodedata
from collections.abc import Callable, Iterator
from hashlib import blake2b

from opsd_train.data.files import short


class Distinct:
    """Counts questions whose `form` was there before; the first of each is kept."""

    def __init__(self, form: Callable[[str], str]) -> None:
        self._form = form
        self.rows = 0
        self.repeats = 0
        self.contradictions = 0
        self._example = ""
        self._first: dict[bytes, tuple[str, str]] = {}  # of each question: id and answer

    def add(self, name: str, question: str, answer: str) -> bool:
        """Whether this question is new."""
        self.rows += 1
        own = (name, answer)
        first = self._first.setdefault(self._key(question), own)
        if first is own:
            return True
        self.repeats += 1
        if normal_form(first[1]) != normal_form(answer):
            self.contradictions += 1
            pair = " and ".join(f"{short(given, 24)} in {row}" for row, given in (first, own))
            self._example = self._example or pair
        return False

    def _key(self, question: str) -> bytes:
        """16 bytes in place of the text: there may be millions."""
        return blake2b(self._form(question).encode(), digest_size=16).digest()

    def lines(self, source: str) -> Iterator[str]:
        """What to tell the user about `source`."""
        if self.repeats:
            yield (
                f"skipped: {self.repeats} of {self.rows} rows of {source} repeat a question; the "
                "first row of each is kept"
            )
        if self.contradictions:
            yield (
                f"warning: {self.contradictions} of these rows contradict the first one's answer "
                f"(such as {self._example})"
            )


def normal_form(text: str) -> str:
    """The text in Unicode form NFKC, without case, runs of white space as one space."""
    if not text.isascii():
        # NFKC alone makes 52 of 5², another number.
        text = unicodedata.normalize("NFKC", "".join(map(_with_position, text)))
    return " ".join(text.casefold().split())


def _with_position(character: str) -> str:
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return {"<super>": "^", "<sub>": "_"}.get(kind, "") + character
