"""The report's plots: time and memory against tokens and against vocabulary, as PNG files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.report.data import Case, Contender, Device
from benchmarks.report.tables import DTYPES, MARK, PHASES, TIMES, slug, suspicious
from opsd_train.reporting.plots import STYLE

OURS, NEUTRAL = "#2563eb", "#64748b"
PEERS = "#c2570c #15803d #7c3aed #db2777 #0f172a #d4a106 #0891b2 #dc2626 #7c2d12".split()
MARKERS = "s^Dv<>P"  # as many as have no common factor with the colours: pairs repeat late
# A log axis has no zero; below this a difference of two memory readings is noise anyway.
LEAST_MIB = 0.1

Value = Callable[[Case, Contender], float | None]


@dataclass(frozen=True)
class Picture:
    title: str
    path: Path


@dataclass(frozen=True)
class Group:
    """Cases that differ in one size only: `axis` is "tokens" or "vocab"."""

    axis: str
    cases: tuple[Case, ...]

    @property
    def title(self) -> str:
        case = self.cases[0]
        dtype = DTYPES.get(case.dtype, case.dtype)
        what = f"{case.title}, {PHASES[case.phase]}, {case.head} head, {dtype}"
        if self.axis == "tokens":
            sizes = f"{case.shape} (hidden size {case.hidden:,}, vocabulary {case.vocab:,})"
        else:
            sizes = f"{case.tokens:,} tokens"
        return f"{what}, {case.inputs} inputs: {sizes}"

    @property
    def to_scale(self) -> bool:
        """Models that share a vocabulary stand side by side instead, in order of hidden size."""
        return len({getattr(case, self.axis) for case in self.cases}) == len(self.cases)

    @property
    def places(self) -> dict[str, int]:
        """Where on the x axis a case stands, by its id."""
        if not self.to_scale:
            return {case.id: place for place, case in enumerate(self.cases)}
        return {case.id: getattr(case, self.axis) for case in self.cases}

    @property
    def slug(self) -> str:
        case = self.cases[0]
        fixed = case.shape if self.axis == "tokens" else f"{case.tokens}-tokens"
        by = f"by-{self.axis}"
        return slug(f"{case.title}-{case.head}-{case.dtype}-{case.inputs}-{fixed}-{by}")


@dataclass(frozen=True)
class Look:
    color: str
    marker: str
    line: str
    width: float


class Point(NamedTuple):
    x: int
    y: float
    who: Contender


def groups(cases: Iterable[Case]) -> list[Group]:
    """Every series of at least two sizes."""
    found: dict[tuple, list[Case]] = defaultdict(list)
    for case in cases:
        kind = (case.title, case.operation, case.head, case.dtype, case.inputs)
        found["tokens", *kind, case.shape, case.hidden, case.vocab].append(case)
        found["vocab", *kind, case.tokens].append(case)
    made = []
    for (axis, *_), members in found.items():
        members.sort(key=lambda c: (getattr(c, axis), c.hidden))
        if len({getattr(case, axis) for case in members}) > 1:
            made.append(Group(axis, tuple(members)))
    return sorted(made, key=lambda group: group.axis)


def draw(device: Device, folder: Path) -> list[Picture]:
    """Writes a device's plots into a folder."""
    looks = _looks(device)
    pictures = []
    with matplotlib.rc_context(STYLE):
        for group in groups(device.cases.values()):
            figure = _figure(group, looks, device.name)
            if figure:
                path = folder / f"{slug(device.name)}-{group.slug}.png"
                figure.savefig(path, dpi=150, metadata={"Software": None})
                pictures.append(Picture(f"{group.title}, {device.name}", path))
    return pictures


def _looks(device: Device) -> dict[str, Look]:
    """One look per contender on the whole page; the first colours to those seen most often."""
    contenders = [c for case in device.cases.values() for c in case.contenders]
    counts = Counter(contender.name for contender in contenders)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    roles = {contender.name: contender.role for contender in contenders}
    # The shortest name is the plain call, the others are its variants.
    ours = sorted((n for n in names if roles[n] == "ours"), key=lambda n: (len(n), n))
    peers = [n for n in names if roles[n] == "peer"]
    looks = {n: Look(NEUTRAL, "", "--", 1.4) for n in names if roles[n] == "floor"}
    for i, name in enumerate(ours):
        line = ("-", "--", ":", "-.")[i % 4]
        looks[name] = Look(OURS, "oXdp"[i % 4], line, 1.3 if i else 2.8)
    for i, name in enumerate(peers):
        looks[name] = Look(PEERS[i % len(PEERS)], MARKERS[i % len(MARKERS)], "-", 1.3)
    return looks


def _figure(group: Group, looks: dict[str, Look], device: str) -> Figure | None:
    wanted: tuple[tuple[str, Value], ...] = (
        ("time, ms", _milliseconds),
        ("time over bare GEMMs", lambda case, who: case.floors(who)),
        ("peak extra memory, MiB", _mib),
    )
    panels = [(label, value) for label, value in wanted if _worth_drawing(group, value)]
    if not panels:
        return None
    height = 4.2 if group.axis == "tokens" else 4.8
    figure = Figure(figsize=(1 + 3.4 * len(panels), height), layout="constrained")
    figure.suptitle(f"{group.title}\n{device}", x=0.01, ha="left", fontsize=9.5)
    drawn: dict[str, Look] = {}
    hollow = False
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, value) in zip(all_axes, panels, strict=True):
        axes.set_title(label, loc="left", fontsize=9, color="#475569")
        for name, look in looks.items():
            points = _points(group, name, value)
            if points:
                drawn[name] = look
                hollow |= _series(axes, points, look)
        _scales(axes, group)
    _legend(figure, drawn, hollow)
    return figure


def _points(group: Group, name: str, value: Value) -> list[Point]:
    found = []
    for case in group.cases:
        for who in case.contenders:
            amount = value(case, who) if who.name == name else None
            if amount is not None:
                found.append(Point(group.places[case.id], amount, who))
    return found


def _milliseconds(case: Case, who: Contender) -> float | None:
    seconds = who.seconds.get(case.phase)
    return None if seconds is None else 1e3 * seconds


def _mib(case: Case, who: Contender) -> float | None:
    mib = case.peak(who)
    return None if mib is None else max(mib, LEAST_MIB)


def _worth_drawing(group: Group, value: Value) -> bool:
    """Whether somebody beside the floor has figures at two sizes."""
    sizes = defaultdict(set)
    for case in group.cases:
        for who in case.contenders:
            if who.role != "floor" and value(case, who) is not None:
                sizes[who.name].add(case.id)
    return any(len(found) > 1 for found in sizes.values())


def _series(axes: Axes, points: list[Point], look: Look) -> bool:
    """Draws one contender; returns whether one of its answers is marked."""
    x, y = [point.x for point in points], [point.y for point in points]
    axes.plot(x, y, color=look.color, ls=look.line, lw=look.width, zorder=2 + look.width)
    bad = [suspicious(point.who.error) for point in points]
    for point, wrong in zip(points, bad, strict=True):
        style = {"color": look.color, "mfc": "white" if wrong else look.color, "ms": 5.5}
        axes.plot(point.x, point.y, marker=look.marker, zorder=3 + look.width, **style)
    return any(bad)


def _scales(axes: Axes, group: Group) -> None:
    axes.set_xscale("log" if group.to_scale else "linear")
    axes.set_yscale("log")
    low, high = axes.dataLim.y0 / 1.25, axes.dataLim.y1 * 1.25
    # At least a factor of five: a flat line looks flat, and 1, 2, 5 are labelled somewhere.
    wider = max(1.0, (5 * low / high) ** 0.5)
    axes.set_ylim(low / wider, high * wider)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    places = list(group.places.values())
    if group.axis == "tokens":
        axes.set_xticks(places, [f"{case.tokens:,}" for case in group.cases])
        axes.set_xlabel("tokens")
    else:
        labels = [f"{c.shape}\n{c.vocab:,} {TIMES} {c.hidden:,}" for c in group.cases]
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
        axes.set_xticks(places, labels, **turned)
        axes.set_xlabel(f"vocabulary {TIMES} hidden size")
    axes.margins(x=0.1)


def _legend(figure: Figure, drawn: dict[str, Look], hollow: bool) -> None:
    handles = [
        Line2D([], [], color=x.color, marker=x.marker, ls=x.line, lw=x.width, label=name, ms=5.5)
        for name, x in drawn.items()
    ]
    if hollow:
        label = f"hollow: {MARK} (see the case's errors)"
        handles.append(
            Line2D([], [], color=NEUTRAL, marker="o", mfc="white", ls="", label=label, ms=5.5)
        )
    columns = 4 if len(figure.axes) > 2 else 3 if len(figure.axes) > 1 else 1
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8.5)
