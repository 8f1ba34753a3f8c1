"""Logits that a forward pass leaves to its backward, so that it need not multiply them again.

An operator returns only tensors whose shapes its fake kernel knows, so what is kept goes from the
operator to its `setup_context` through a slot of the thread. Compiled code opens no slot.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from opsd_kernels.plan import Plan
from opsd_kernels.problem import GradsNeeded, Kept


class _Slot(threading.local):
    needed: GradsNeeded | None = None  # of the backward; None: nothing is to be kept
    kept: Kept | None = None


_slot = _Slot()
# What is kept now: one block in a process, however many losses wait for their backward.
_alive: weakref.ref[Kept] | None = None


@contextlib.contextmanager
def keeping(needed: GradsNeeded) -> Iterator[None]:
    """Within, an operator of a trained head may keep logits for the gradients needed."""
    if not torch.compiler.is_compiling():
        _slot.needed = needed
    try:
        yield
    finally:
        _slot.needed = _slot.kept = None


def wanted(group_name: str | None) -> GradsNeeded | None:
    """The gradients for which to keep logits, or None.

    Never with a process group: ranks multiply the same blocks together, and one of them might keep
    what another does not.
    """
    waiting = _alive is not None and _alive() is not None
    return None if waiting or group_name is not None else _slot.needed


def arguments(
    chosen: Plan, later: GradsNeeded | None, from_forward: Kept | None
) -> dict[str, bool | Kept | None]:
    """Arguments of a backend's loss: only one of them keeps logits between forward and backward."""
    if chosen.backend != "cpp":
        return {}
    return {"keeps": later is not None, "kept": from_forward}


def put(kept: Kept | None) -> None:
    """Leave what an operator has kept to its `setup_context`."""
    global _alive
    _slot.kept = kept
    if kept is not None:
        _alive = weakref.ref(kept)


def same_rows(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether two masks of the tokens to compute are equal."""
    return before is now or (before is not None and now is not None and torch.equal(before, now))


def take() -> Kept | None:
    """What the operator of this `setup_context` has kept."""
    kept, _slot.kept = _slot.kept, None
    return kept
