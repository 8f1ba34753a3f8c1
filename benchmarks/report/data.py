"""What the report shows: devices, their cases, and who computed them in what time and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


class ReportError(Exception):
    """A message for the user; the command ends with it and no traceback."""


@dataclass(frozen=True)
class Source:
    """The file a figure comes from, and what was measured on."""

    file: str
    environment: Json
    memory_method: str | None = None


@dataclass(frozen=True)
class Contender:
    """One way to compute a case; without `seconds` where it did not run, and `why_not` says why."""

    name: str
    role: str  # floor, ours or peer
    seconds: dict[str, float]  # medians of forward, backward, both
    samples: int  # as many timed calls; a slow peer sits out the rounds
    peak_extra_mib: dict[str, float | None]
    error: dict[str, float | None]  # loss is signed, gradients are RMS, all relative
    why_not: str | None
    peak_why: str | None


@dataclass(frozen=True)
class Case:
    """One operation at one shape, with everybody who computes it."""

    id: str
    operation: str
    title: str
    head: str
    dtype: str
    shape: str
    tokens: int
    hidden: int
    vocab: int
    inputs: str
    gemms: int | None
    rounds: int | None
    error_rows: int | None
    plan: str | None
    contenders: tuple[Contender, ...]
    source: Source

    @property
    def phase(self) -> str:
        """What is compared: forward and backward together, where there is a backward."""
        return "both" if any("both" in c.seconds for c in self.contenders) else "forward"

    @property
    def floor(self) -> Contender | None:
        return next(iter(self.measured("floor")), None)

    @property
    def ours(self) -> Contender | None:
        return next(iter(self.measured("ours")), None)

    @property
    def fastest_peer(self) -> Contender | None:
        """Whatever its error: a wrong answer is marked, not passed over."""
        return min(self.measured("peer"), key=lambda c: c.seconds[self.phase], default=None)

    def measured(self, role: str) -> list[Contender]:
        return [c for c in self.contenders if c.role == role and self.phase in c.seconds]

    def floors(self, contender: Contender) -> float | None:
        """The contender's time over that of the bare products."""
        if not self.floor or self.phase not in contender.seconds:
            return None
        return contender.seconds[self.phase] / self.floor.seconds[self.phase]

    def peak(self, contender: Contender) -> float | None:
        return contender.peak_extra_mib.get(self.phase)


@dataclass(frozen=True)
class Trainer:
    """One trainer's step, in medians over the steps."""

    name: str
    phases: dict[str, float]
    seconds: float | None
    training: float | None  # seconds outside the rollout
    peak_extra_mib: float | None
    peak_mib: float | None
    loss_tokens: int | None
    loss: float | None  # mean over the steps
    why_not: str | None


@dataclass(frozen=True)
class TrainStep:
    settings: Json
    trainers: tuple[Trainer, ...]
    source: Source


@dataclass(frozen=True)
class PatchedTrainer:
    """A trainer of TRL's as it is and fused: medians over the steps."""

    name: str
    seconds: tuple[float, float]
    peak_extra_mib: tuple[float, float]


@dataclass(frozen=True)
class Integrations:
    settings: Json
    trainers: tuple[PatchedTrainer, ...]
    source: Source


@dataclass(frozen=True)
class DecodedBatch:
    """Tokens per second of our engine and of `generate`: of the median of the rounds."""

    dtype: str
    batch: int
    ours: float
    generate: float


@dataclass(frozen=True)
class Decoding:
    settings: Json
    batches: tuple[DecodedBatch, ...]
    source: Source


@dataclass(frozen=True)
class Neighbour:
    """A contender's seconds a call, medians, without and with a busy process on its cores."""

    settings: Json
    rows: tuple[tuple[str, float, float], ...]  # name, alone, beside
    source: Source


@dataclass(frozen=True)
class Share:
    """An accuracy with its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Demo:
    recipe: str
    steps: int
    problems: int
    before: Share
    after: Share
    gain: Share
    gained: int
    lost: int
    teacher: Share | None
    majority: tuple[str, float] | None  # the answer, its accuracy
    divergence: tuple[float, float] | None  # before, after
    tokens: int
    peak_mib: float
    seconds: float
    source: Source


@dataclass(frozen=True)
class GpuReport:
    """What a command of `benchmarks.gpu_report` found; rows in the order they came."""

    stages: list[Json]
    rows: list[Json]
    failed: list[Json]
    steps: list[TrainStep]
    source: Source

    def found(self, stage: str) -> dict[str, Json]:
        """By id, what one of its stages found."""
        return {r["id"]: r["found"] for r in self.rows_that("found") if r["stage"] == stage}

    def rows_that(self, outcome: str) -> list[Json]:
        """The rows that were "found" or "absent"."""
        return [row for row in self.rows if outcome in row]


@dataclass(frozen=True)
class SparseTeacher:
    """Losses of a teacher known at its k most likely tokens, beside those of the whole of it."""

    settings: Json
    rows: tuple[Json, ...]
    source: Source


@dataclass(frozen=True)
class SparseAccuracy:
    """Accuracy of runs whose teacher is known at k tokens; the last k is None, the whole of it."""

    settings: Json
    rows: tuple[tuple[int | None, Share], ...]
    source: Source


@dataclass(frozen=True)
class Ahead:
    """Steps of runs with `rollout.ahead` 0 and 1: medians over all that count."""

    settings: Json
    rows: tuple[tuple[int, float, float], ...]  # ahead, seconds, of them for samples
    source: Source


@dataclass
class Device:
    """All that was measured on one device; of a thing measured twice, the newest."""

    name: str
    kind: str
    cases: dict[str, Case] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    steps: dict[str, TrainStep] = field(default_factory=dict)
    demos: dict[str, Demo] = field(default_factory=dict)
    integrations: list[Integrations] = field(default_factory=list)  # the newest last
    decodings: list[Decoding] = field(default_factory=list)  # the newest last
    neighbours: list[Neighbour] = field(default_factory=list)  # the newest last
    sparse_teachers: list[SparseTeacher] = field(default_factory=list)  # the newest last
    sparse_accuracies: list[SparseAccuracy] = field(default_factory=list)  # the newest last
    aheads: list[Ahead] = field(default_factory=list)  # the newest last
    gpu_reports: list[GpuReport] = field(default_factory=list)  # the newest last

    def sources(self) -> list[Source]:
        found = [*self.cases.values(), *self.steps.values(), *self.demos.values()]
        found += [*self.gpu_reports, *self.integrations, *self.decodings, *self.neighbours]
        found += [*self.sparse_teachers, *self.sparse_accuracies, *self.aheads]
        return sorted({x.source.file: x.source for x in found}.values(), key=lambda s: s.file)
