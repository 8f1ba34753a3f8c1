"""A fingerprint of a run's problems and their split, to detect changed data on resume."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from opsd_train.data.files import shorten_path
from opsd_train.data.problems import Problem

_BYTES = 8  # per hash of a problem
_PARTS = ("train", "heldout")

Fingerprint = dict[str, str]
"""Hashes of the problems in order (train, heldout), as base64, and a hex digest of the ids."""


def fingerprint(train: Sequence[Problem], heldout: Sequence[Problem]) -> Fingerprint:
    """The fingerprint of the problems' texts, teachers, split, order and ids; can be written as
    JSON."""
    ids = blake2b("\0".join(p.id for p in (*train, *heldout)).encode(), digest_size=16)
    return {"train": _hashes(train), "heldout": _hashes(heldout), "ids": ids.hexdigest()}


def recorded_fingerprint(checkpoint: Path) -> Fingerprint | None:
    """The fingerprint stored in a checkpoint; None if it has none or cannot be read."""
    try:
        state = (checkpoint / "trainer_state.json").read_text(encoding="utf-8")
        return json.loads(state).get("data")
    except (OSError, ValueError):
        return None


def difference(old: Fingerprint, new: Fingerprint, checkpoint: Path) -> str | None:
    """How the data differs from the checkpoint's, to begin an error message; None: not at all."""
    if old == new:
        return None
    before, after = ({part: _split(of[part]) for part in _PARTS} for of in (old, new))
    return (
        f"the data is not that of {shorten_path(checkpoint)} ({_sizes(before)}): it is now "
        f"{_sizes(after)}, {_changes(before, after)}"
    )


def _changes(before: dict[str, list[bytes]], after: dict[str, list[bytes]]) -> str:
    old, new = (set(of["train"]) | set(of["heldout"]) for of in (before, after))
    moved = len(set(before["train"]) & set(after["heldout"]))
    counts = {"new": len(new - old), "gone": len(old - new), "now held out": moved}
    found = [f"{count} {what}" for what, count in counts.items() if count]
    return ", ".join(found) or "from other rows or in another order"


def _sizes(of: dict[str, list[bytes]]) -> str:
    return f"{len(of['train'])} + {len(of['heldout'])} held out"


def _hashes(problems: Sequence[Problem]) -> str:
    texts = (
        "\0".join((p.question, p.answer, p.solution, *([p.teacher] if p.teacher else [])))
        for p in problems
    )
    hashes = (blake2b(text.encode(), digest_size=_BYTES).digest() for text in texts)
    return base64.b64encode(b"".join(hashes)).decode()


def _split(text: str) -> list[bytes]:
    data = base64.b64decode(text)
    return [data[first : first + _BYTES] for first in range(0, len(data), _BYTES)]
