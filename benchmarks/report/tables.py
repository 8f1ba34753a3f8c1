"""Figures as text: units, the mark on wrong answers, and the tables both outputs share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.report.data import (
    Ahead,
    Case,
    Contender,
    Decoding,
    Demo,
    Device,
    Integrations,
    Json,
    Neighbour,
    Share,
    Source,
    SparseAccuracy,
    SparseTeacher,
    Trainer,
    TrainStep,
)

# Relative errors beyond which an answer is marked, in every output alike.
LOSS_LIMIT = 0.01
GRADIENT_LIMIT = 0.05
MARK = "wrong?"
NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
PHASES = {"both": "forward and backward", "forward": "forward"}


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `names` columns are words, the others figures; `bold` are rows."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    bold: frozenset[int] = frozenset()


def suspicious(error: Mapping[str, float | None] | None) -> bool:
    """Whether a relative error ("loss", "grad_...") is too large, or NaN, for a right answer."""
    for key, value in (error or {}).items():
        limit = GRADIENT_LIMIT if key.startswith("grad") else LOSS_LIMIT
        if value is not None and not abs(float(value)) <= limit:
            return True
    return False


def worst_gradient(error: Mapping[str, float | None]) -> float | None:
    """The largest gradient error; NaN is larger than any."""
    values = [v for k, v in error.items() if k.startswith("grad") and v is not None]
    return max(values, key=lambda v: float("inf") if v != v else v, default=None)


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    # Rounded first, lest 0.9999 s read as 1000 ms.
    seconds = float(f"{seconds:.3g}")
    if seconds >= 1:
        return f"{_three(seconds)} s"
    return f"{_three(1e3 * seconds)} ms" if seconds >= 1e-3 else f"{_three(1e6 * seconds)} µs"


def ratio_text(ratio: float | None) -> str:
    return NONE if ratio is None else _three(ratio)


def mib_text(mib: float | None) -> str:
    if mib is None:
        return NONE
    return f"{mib:,.0f} MiB" if mib >= 9.95 else f"{mib:.1f} MiB"


def percent_text(share: float | None, signed: bool = False) -> str:
    """In percent: one decimal, or the first digit of what is less than 0.05 %."""
    if share is None:
        return NONE
    if share != share:
        return "nan"
    percent = 100 * share
    if 0 < abs(percent) < 0.001:
        return "<0.001 %"
    sign = MINUS if percent < 0 else "+" if signed and percent else ""
    size = abs(percent)
    return f"{sign}{size:.1f} %" if size >= 0.05 else f"{sign}{size:.1g} %"


def duration_text(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def label(case: Case, contender: Contender) -> str:
    """The name, with what a reader should know beside it."""
    notes = [MARK] if suspicious(contender.error) else []
    notes += [fewer] if (fewer := fewer_calls(case, contender)) else []
    return f"{contender.name} ({', '.join(notes)})" if notes else contender.name


def fewer_calls(case: Case, contender: Contender) -> str | None:
    """Said of a contender that was timed less often than the case's rounds."""
    if not contender.samples or contender.samples >= (case.rounds or 0):
        return None
    count = contender.samples
    return "timed once" if count == 1 else f"{count} calls"


def loss_error(contender: Contender) -> str:
    return percent_text(contender.error.get("loss"), signed=True)


def environment_text(environment: Json) -> str:
    """Device, cores, memory, versions, commit and date, as far as they are known."""
    cores, threads = environment.get("cores"), environment.get("threads")
    used = f" ({threads} threads)" if threads and threads != cores else ""
    parts = [environment["device"], f"{cores} cores{used}" if cores else ""]
    if environment.get("memory_gib"):
        parts.append(f"{environment['memory_gib']:g} GiB")
    parts.append(versions_text(environment))
    parts.append(commit_text(environment))
    return ", ".join(part for part in [*parts, environment.get("date")] if part)


def versions_text(environment: Json) -> str:
    versions = {"Python": environment.get("python")} | (environment.get("versions") or {})
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def commit_text(environment: Json) -> str:
    commit = environment.get("commit") or ""
    changed = " with local changes" if commit.endswith("+") else ""
    return f"commit {commit.rstrip('+')[:9]}{changed}" if commit else "commit unknown"


def case_text(case: Case) -> str:
    """The whole case in a line, without who computes it."""
    return (
        f"{case.title}, {PHASES[case.phase]}; {case.shape}: {case.tokens:,} tokens, hidden size "
        f"{case.hidden:,}, vocabulary {case.vocab:,}; {dtype_text(case)}, {case.head} head, "
        f"{case.inputs} inputs"
    )


def dtype_text(case: Case) -> str:
    return DTYPES.get(case.dtype, case.dtype)


def headline(device: Device) -> Case | None:
    """The headline case: the JSD that most peers took every round of, the largest of several.

    At least two peers computed it. On a GPU, which a small case leaves idle, two that took every
    round are enough.
    """
    wanted = ("jsd", "frozen", "bfloat16", "random")
    found = [
        case
        for case in device.cases.values()
        if (case.operation, case.head, case.dtype, case.inputs) == wanted
        and len(case.measured("peer")) >= 2
        and case.floor
    ]

    def rank(case: Case) -> tuple:
        complete = [peer for peer in case.measured("peer") if not fewer_calls(case, peer)]
        most = 2 if device.kind == "cuda" else len(complete)
        return min(len(complete), most), case.tokens * case.vocab, case.hidden, case.id

    return max(found, key=rank, default=None)


def headline_table(case: Case) -> Table:
    rows = []
    for contender in case.contenders:
        name = label(case, contender)
        if case.phase not in contender.seconds:
            why = contender.why_not or "not measured"
            rows.append((f"{name}: {why}", NONE, NONE, NONE, NONE))
            continue
        errors = (loss_error(contender), percent_text(worst_gradient(contender.error)))
        figures = (ratio_text(case.floors(contender)), mib_text(case.peak(contender)))
        rows.append((name, *figures, *errors))
    header = ("", "time over bare GEMMs", "peak extra memory", "loss error", "gradient error")
    bold = frozenset(i for i, c in enumerate(case.contenders) if c is case.ours)
    return Table(header, tuple(rows), bold=bold)


def overview_table(cases: Iterable[Case]) -> Table:
    """One row per case: ours beside the fastest peer."""
    header = (
        *("loss, head, dtype", "shape, tokens, inputs", "fastest peer"),
        *(f"ours, {TIMES} GEMMs", f"peer, {TIMES} GEMMs", "faster"),
        *("ours, peak extra", "peer, peak extra"),
        *("ours, loss / gradient error", "peer, loss / gradient error"),
    )
    return Table(header, tuple(_overview_row(case) for case in cases), names=3)


def _overview_row(case: Case) -> tuple[str, ...]:
    ours, peer = case.ours, case.fastest_peer
    pair = (ours, peer)
    what = f"{case.title}, {case.head}, {dtype_text(case)}"
    where = f"{case.shape}, {case.tokens:,}, {case.inputs}"
    floors = [ratio_text(case.floors(c)) if c else NONE for c in pair]
    if ours and suspicious(ours.error):
        floors[0] += f" ({MARK})"
    gain = faster_text(case)
    peaks = [mib_text(case.peak(c)) if c else NONE for c in pair]
    errors = [_both_errors(c) if c else NONE for c in pair]
    return (what, where, label(case, peer) if peer else "none runs", *floors, gain, *peaks, *errors)


def _both_errors(contender: Contender) -> str:
    gradient = percent_text(worst_gradient(contender.error))
    return f"{loss_error(contender)} / {gradient}"


def faster_text(case: Case, ours: Contender | None = None) -> str:
    """Which is faster, ours or the fastest peer, and by what factor."""
    ours, peer = ours or case.ours, case.fastest_peer
    if not ours or not peer or case.phase not in ours.seconds:
        return NONE
    gain = peer.seconds[case.phase] / ours.seconds[case.phase]
    if round(gain, 2) == 1.0:
        return "neither"
    return (
        f"ours, {ratio_text(gain)}{TIMES}" if gain > 1 else f"peer, {ratio_text(1 / gain)}{TIMES}"
    )


def train_step_table(step: TrainStep) -> Table:
    """Phases down, trainers across; ratios are over the first trainer that ran."""
    trainers = [t for t in step.trainers if not t.why_not]
    reference = next((t for t in trainers if t.seconds), None)
    phases = dict.fromkeys(phase for t in trainers for phase in t.phases)
    rows = [(phase, *(time_text(t.phases.get(phase)) for t in trainers)) for phase in phases]
    rows.append(("whole step", *(time_text(t.seconds) for t in trainers)))
    if reference:
        rows.append(
            (f"whole step over {reference.name}'s", *_ratios(trainers, reference, "seconds"))
        )
    rows.append(("all but the rollout", *(time_text(t.training) for t in trainers)))
    if reference:
        ratios = _ratios(trainers, reference, "training")
        rows.append((f"all but the rollout over {reference.name}'s", *ratios))
    rows.append(("peak extra memory", *(mib_text(t.peak_extra_mib) for t in trainers)))
    if reference:
        ratios = _ratios(trainers, reference, "peak_extra_mib")
        rows.append((f"peak extra memory over {reference.name}'s", *ratios))
    rows.append(("peak memory", *(mib_text(t.peak_mib) for t in trainers)))
    tokens = (f"{t.loss_tokens:,}" if t.loss_tokens else NONE for t in trainers)
    rows.append(("loss tokens", *tokens))
    rows.append(("mean loss", *(NONE if t.loss is None else f"{t.loss:.4g}" for t in trainers)))
    shown = (row for row in rows if any(cell != NONE for cell in row[1:]))
    bold = frozenset([len(phases)])
    return Table(("median of the steps", *(t.name for t in trainers)), tuple(shown), bold=bold)


def integrations_table(measured: Integrations) -> Table:
    """A trainer of TRL's per row: seconds and memory of a step, as it is and fused."""
    rows = []
    for t in measured.trainers:
        time, memory = (fused / plain for plain, fused in (t.seconds, t.peak_extra_mib))
        cells = (*map(time_text, t.seconds), ratio_text(time))
        rows.append((t.name, *cells, *map(mib_text, t.peak_extra_mib), ratio_text(memory)))
    header = ("trainer", "step", "fused", "fused / plain", "memory", "fused", "fused / plain")
    return Table(header, tuple(rows))


def decode_table(decoding: Decoding) -> Table:
    """A batch per row: tokens per second of both, and how many times as fast ours is."""
    rows = [
        (
            b.dtype,
            str(b.batch),
            f"{b.ours:.1f}",
            f"{b.generate:.1f}",
            ratio_text(b.ours / b.generate),
        )
        for b in decoding.batches
    ]
    header = ("dtype", "sequences", "opsd_train, tokens/s", "generate, tokens/s", "ours / generate")
    return Table(header, tuple(rows))


def neighbour_table(measured: Neighbour) -> Table:
    """A contender per row: a call alone, beside the busy process, and the ratio."""
    rows = (
        (name, time_text(alone), time_text(beside), ratio_text(beside / alone))
        for name, alone, beside in measured.rows
    )
    return Table(("", "alone", "beside a busy process", "beside / alone"), tuple(rows))


def sparse_teacher_table(measured: SparseTeacher) -> Table:
    """A divergence and k per row: value and gradient beside those over the whole vocabulary."""
    rows = (
        (
            row["divergence"],
            f"{row['k']:,}",
            f"{row['teacher_mass']:.4f}",
            f"{row['with']['value']:.3f}",
            f"{100 * row['with']['grad_error']:.3g} %",
            f"{row['with']['grad_cosine']:.4f}",
            f"{100 * row['without']['grad_error']:.3g} %",
        )
        for row in measured.rows
    )
    header = (
        *("divergence", "k", "teacher's mass in them", "value / whole", "gradient off by"),
        *("its cosine", "off by, without the rest"),
    )
    return Table(header, tuple(rows))


def sparse_accuracy_table(measured: SparseAccuracy) -> Table:
    """A k per row: the accuracy of a run on held-out problems, with its interval."""
    rows = (_share_row("the whole" if k is None else str(k), x) for k, x in measured.rows)
    return Table(("k", "accuracy after", "95 % interval"), tuple(rows))


def ahead_table(measured: Ahead) -> Table:
    """A row for each value of `rollout.ahead`: a step, its wait for samples, and the speed-up."""
    (_, without, _), _ = measured.rows
    rows = (
        (str(ahead), time_text(seconds), time_text(waiting), ratio_text(without / seconds))
        for ahead, seconds, waiting in measured.rows
    )
    return Table(("rollout.ahead", "a step", "of it for samples", "times as fast"), tuple(rows))


def _ratios(trainers: list[Trainer], reference: Trainer, name: str) -> list[str]:
    values, one = [getattr(t, name) for t in trainers], getattr(reference, name)
    return [ratio_text(value / one if value and one else None) for value in values]


def settings_text(settings: Json) -> str:
    plain = {k: v for k, v in settings.items() if not isinstance(v, dict | list)}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items())


def demo_table(demo: Demo) -> Table:
    rows = [
        _share_row("student before", demo.before),
        _share_row(f"student after {demo.steps} steps", demo.after),
    ]
    low, high = (_signed(bound) for bound in (demo.gain.low, demo.gain.high))
    spread = f"{low} to {high} ({demo.gained} gained, {demo.lost} lost)"
    rows.append(("paired difference", f"{_signed(demo.gain.mean)} points", spread))
    if demo.teacher:
        rows.append(_share_row("teacher: the same model, solution in its prompt", demo.teacher))
    if demo.majority:
        answer, mean = demo.majority
        rows.append((f'always the most frequent answer ("{answer}")', f"{100 * mean:.1f} %", ""))
    return Table(("", "accuracy", "95 % interval"), tuple(rows), bold=frozenset([1, 2]))


def demo_text(demo: Demo) -> str:
    """The line below the demo's table."""
    start = ""
    if demo.divergence:
        before, after = (f"{value:.4f}" for value in demo.divergence)
        start = f"Mean divergence on the held-out problems {before} before, {after} after; "
    cost = f"{demo.tokens:,} tokens generated for training, peak memory {mib_text(demo.peak_mib)}"
    return f"{start}{cost}, {duration_text(demo.seconds)} in all."


def files_text(sources: Iterable[Source]) -> str:
    return ", ".join(f"`{source.file}`" for source in sources)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _share_row(name: str, share: Share) -> tuple[str, str, str]:
    interval = f"{100 * share.low:.1f} to {100 * share.high:.1f} %"
    return name, f"{100 * share.mean:.1f} %", interval


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"
