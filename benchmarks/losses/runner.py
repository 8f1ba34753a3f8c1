"""Measure time, errors and memory of one case: all contenders in turn, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.environment import total_memory
from benchmarks.losses.call import call, samples
from benchmarks.losses.cases import Case
from benchmarks.losses.check import Check
from benchmarks.losses.contenders import FLOOR, OURS, Contender, contenders, our_plan
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.memory import Memory

MAX_ROUNDS, MIN_ROUNDS = 20, 5
# A peer that takes so many times ours is far enough behind for few samples to show it: one if it
# takes twice that long, else the best of _FEW, for some machines halve their speed for seconds.
_FAR, _FEW = 2.0, 3
# Between two that are nearer than this the least number of rounds cannot tell who is first.
_NEAR, NEAR_ROUNDS = 1.25, 15


@dataclass
class Samples:
    """Seconds of each call, forward and backward separately."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def add(self, forward: float, backward: float) -> None:
        """Add one call."""
        self.forward.append(forward)
        self.backward.append(backward)

    @property
    def median(self) -> float:
        """Of forward and backward together."""
        return median(f + b for f, b in zip(self.forward, self.backward, strict=True))

    @property
    def best(self) -> float:
        """Least of forward and backward together."""
        return min(f + b for f, b in zip(self.forward, self.backward, strict=True))

    def as_json(self, differentiated: bool) -> dict[str, list[float]]:
        """Lists by part; "backward" and "both" only if `differentiated`."""
        both = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        parts = {"forward": self.forward}
        if differentiated:
            parts |= {"backward": self.backward, "both": both}
        return {name: [round(value, 7) for value in values] for name, values in parts.items()}


def measure(
    case: Case,
    device: torch.device,
    memory: Memory,
    *,
    budget: float = 3.0,
    rounds: int | None = None,
    patience: float = 1.2,
    compiled: bool = True,
    wanted: Callable[[Contender], bool] | None = None,
    drive: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Measure one case; returns its JSON.

    budget    seconds for all rounds, which sets their number if `rounds` is None; then ours, the
              floor and every peer near ours take NEAR_ROUNDS
    patience  a peer that takes more seconds a call, and twice ours, is not timed in rounds: its
              samples are one to three calls before them
    compiled  whether contenders that compile take part
    wanted    selects contenders
    drive     runs the rounds as drive(target, setup=, rounds=), like pytest-benchmark's `pedantic`:
              `setup` runs all others, `target` ours
    """
    # Else the ninth shape exceeds Dynamo's recompile limit, and peers that compile run eagerly.
    torch.compiler.reset()
    x = Inputs(case, device)
    everyone = [c for c in contenders(case, device) if wanted is None or wanted(c)]
    taking_part, absent = _present(case, everyone, device, compiled)
    check = Check(x)
    first = {c.name: _warm_up(c, x, check, absent) for c in taking_part}
    taking_part = [c for c in taking_part if c.name not in absent]
    timed = {c.name: Samples() for c in taking_part}
    limit = max(patience, _FAR * sum(first[OURS]))
    quick = []
    for contender in taking_part:
        before = Samples([first[contender.name][0]], [first[contender.name][1]])
        if contender.role == "peer" and _is_far(contender, x, before, limit):
            timed[contender.name] = before
        else:
            quick.append(contender)
    chosen = rounds or _rounds(sum(sum(first[c.name]) for c in quick), budget)
    _run_rounds(quick, x, timed, chosen, drive or _plain)
    near = _near(quick, timed)
    if rounds is None and near and chosen < NEAR_ROUNDS:
        _run_rounds(near, x, timed, NEAR_ROUNDS - chosen, _plain)
        chosen = NEAR_ROUNDS
    found: dict[str, dict[str, Any]] = {}
    for c in everyone:
        found[c.name] = {"role": c.role}
        if c.name in absent:
            found[c.name]["why_not"] = absent[c.name]
            continue
        seconds = timed[c.name].as_json(case.differentiated)
        found[c.name] |= {"seconds": seconds} | memory.measure(c, x)
        if c.name in check.errors:
            found[c.name]["error"] = check.errors[c.name]
    return _describe(case, device, chosen, len(check.tokens)) | {"contenders": found}


def _describe(case: Case, device: torch.device, rounds: int, checked: int) -> dict[str, Any]:
    return {
        "id": case.id,
        "operation": case.operation,
        "title": case.title,
        "head": case.head,
        "dtype": case.dtype,
        "shape": case.shape.name,
        "tokens": case.tokens,
        "hidden": case.shape.hidden,
        "vocab": case.shape.vocab,
        "inputs": case.inputs,
        "gemms": case.gemms,
        "rounds": rounds,
        "error_rows": checked,
        "plan": str(our_plan(case, device)),
    }


def _present(
    case: Case, everyone: list[Contender], device: torch.device, compiled: bool
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can run, and why the others cannot."""
    taking_part, absent = [], {}
    for contender in everyone:
        reason = contender.why_not(case, device, total_memory(device))
        if contender.compiles and not compiled:
            reason = "compiles for longer than it runs: only in the first cases and with --full"
        if reason is None:
            taking_part.append(contender)
        else:
            absent[contender.name] = reason
    return taking_part, absent


def _warm_up(
    contender: Contender, x: Inputs, check: Check, absent: dict[str, str]
) -> tuple[float, float]:
    """Seconds of a full-size call after everything is loaded and compiled; checks its answers.

    On a GPU most peers compile kernels for the shape, so a call of that size goes before.

    A peer's error goes into `absent`; an error of ours is raised.
    """
    try:
        if contender.compiles or x.student.is_cuda:
            call(contender, x)
        else:
            call(contender, Inputs(x.case.small, x.student.device))
        *seconds, loss = call(contender, x)
        if contender.role != "floor":
            check.answers(contender, x, loss)
        return tuple(seconds)
    except Exception as error:
        if contender.role != "peer":
            raise
        lines = str(error).strip().splitlines() or [""]
        absent[contender.name] = f"{type(error).__name__}: {lines[0]}"[:200]
        return 0.0, 0.0
    finally:
        x.clear()


def _is_far(contender: Contender, x: Inputs, found: Samples, limit: float) -> bool:
    """Whether the best of the samples is above limit; near it they are a few."""
    while limit < found.best <= 2 * limit and len(found.forward) < _FEW:
        forward, backward, _ = call(contender, x)
        found.add(forward, backward)
        x.clear()
    return found.best > limit


def _rounds(seconds: float, budget: float) -> int:
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / max(seconds, 1e-6))))


def _run_rounds(
    taking_part: list[Contender],
    x: Inputs,
    found: dict[str, Samples],
    rounds: int,
    drive: Callable[..., Any],
) -> None:
    ours = next(c for c in taking_part if c.name == OURS)
    others = [c for c in taking_part if c is not ours]

    def sample(contender: Contender) -> None:
        for seconds in samples(contender, x):
            found[contender.name].add(*seconds)

    def all_others() -> None:
        for contender in others:
            sample(contender)
        others.append(others.pop(0))  # rotate: no contender always follows the same one
        x.clear()

    drive(lambda: sample(ours), setup=all_others, rounds=rounds)
    x.clear()


def _near(quick: list[Contender], timed: dict[str, Samples]) -> list[Contender]:
    """Ours, the floor and the peers whose time is near ours; empty if none is."""
    ours = timed[OURS].median
    peers = [c for c in quick if c.role == "peer"]
    near = {c.name for c in peers if 1 / _NEAR < timed[c.name].median / ours < _NEAR}
    kept = near | {FLOOR, OURS}
    return [c for c in quick if c.name in kept] if near else []


def _plain(target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        setup()
        target()
