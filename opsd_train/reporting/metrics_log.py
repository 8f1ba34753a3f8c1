"""Log a run as it goes: metrics, samples, TensorBoard, the progress bar, the summary."""

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from opsd_train.config.errors import UserError
from opsd_train.reporting.sample_table import Rows, sample_table
from opsd_train.reporting.trackers import Tracker, numbers

# The metrics shown after each step, if the row has them; short, to fit into 80 columns.
SHOWN = {
    "loss": "loss {:.4f}",
    "divergence": "div {:.4f}",
    "accuracy": "acc {:.0%}",
    "tokens_per_second": "{:.0f} tok/s",
}
SHOWN_IN_LOGS = SHOWN | {"loss_tokens": "{} tokens", "seconds": "{:.1f} s"}
# The values of an evaluation that go to trackers and TensorBoard.
EVALUATION_SCALARS = ("accuracy", "length", "divergence")


class RunLogger:
    """Context manager that writes a run folder's metrics.jsonl, evaluations.jsonl, samples.jsonl,
    summary.json and TensorBoard events, and logs to the trackers.

    On a terminal it draws a progress bar; elsewhere it prints one line per step. In a folder with
    files of an older run it replaces them. A run resumed after `resume_step` keeps the rows up to
    that step and drops later ones; its evaluations.jsonl starts with `evaluations`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        console: Console | None = None,
        *,
        resume_step: int | None = None,
        evaluations: Sequence[dict[str, Any]] = (),
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.console = console or Console()
        self._resume_step = resume_step
        self._past_evaluations = evaluations
        self._trackers = trackers
        self._recent_seconds: deque[float] = deque(maxlen=10)
        self._progress = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            console=self.console,
        )

    def __enter__(self) -> "RunLogger":
        # Imported here because it imports torch.
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "report.html"):  # else they would pass for this run's
            (self.run_dir / name).unlink(missing_ok=True)
        events, resumed = self.run_dir / "tensorboard", self._resume_step
        if resumed is None:
            shutil.rmtree(events, ignore_errors=True)
        self._metrics = _open_rows(self.run_dir / "metrics.jsonl", resumed)
        # The checkpoint's, not the file's: the file may already have a later one, of the same step.
        evaluations = self.run_dir / "evaluations.jsonl"
        replace_file(evaluations, "".join(_json_line(row) for row in self._past_evaluations))
        self._evaluations = open(evaluations, "a", encoding="utf-8")
        self._samples = _open_rows(self.run_dir / "samples.jsonl", resumed)
        purge_step = None if resumed is None else resumed + 1
        self._tensorboard = SummaryWriter(str(events), purge_step=purge_step)
        self._task = self._progress.add_task(
            "training", total=self.total_steps, completed=resumed or 0, shown=""
        )
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._progress.stop()
        self._metrics.close()
        self._evaluations.close()
        self._samples.close()
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.finish()

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Record and show one step's metrics."""
        _append(self._metrics, {"step": step} | row)
        for name, value in numbers(row).items():
            self._tensorboard.add_scalar(f"train/{name}", value, step)
        self._tensorboard.flush()
        for tracker in self._trackers:
            tracker.log(step, row)

        self._show_step(step, row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Record one evaluation on held-out problems."""
        _append(self._evaluations, row)
        step, found = row["step"], {name: row[name] for name in EVALUATION_SCALARS if name in row}
        for name, value in found.items():
            self._tensorboard.add_scalar(f"eval/{name}", value, step)
        self._tensorboard.flush()
        for tracker in self._trackers:
            tracker.log(step, {f"eval/{name}": value for name, value in found.items()})

    def samples(self, step: int, rows: Rows) -> None:
        """Record sample completions; on a terminal also show them as a table."""
        for row in rows:
            _append(self._samples, {"step": step} | row)
        if self.console.is_terminal and rows:
            self.console.print(sample_table(step, rows))

    def summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json atomically and print the summary."""
        text = json.dumps(_finite(summary), indent=2) + "\n"
        replace_file(self.run_dir / "summary.json", text)
        lines = summary_lines(summary)
        width = max((len(label) for label, _ in lines), default=0)
        for label, value in lines:
            self.console.print(f"{label:{width}}  {value}", markup=False, soft_wrap=True)

    def _show_step(self, step: int, row: dict[str, Any]) -> None:
        forms = SHOWN if self.console.is_terminal else SHOWN_IN_LOGS
        shown = [form.format(row[key]) for key, form in forms.items() if row.get(key) is not None]
        if "seconds" in row:
            self._recent_seconds.append(row["seconds"])
            mean = sum(self._recent_seconds) / len(self._recent_seconds)
            shown.append(f"{duration(mean * (self.total_steps - step))} left")
        if self.console.is_terminal:
            self._progress.update(self._task, completed=step, shown="  ".join(shown))
        else:
            print(f"step {step}/{self.total_steps}  " + "  ".join(shown), file=self.console.file)
            self.console.file.flush()


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A summary as (label, text) lines; values that the summary does not have are left out."""
    lines = [("status", f"{summary['status']} after {summary['steps']} steps")]
    lines += _accuracy_lines(summary)
    before, after = summary.get("divergence_before"), summary.get("divergence_after")
    if before is not None and after is not None:
        lines.append(("divergence", f"{before:.4f} before, {after:.4f} after"))
    if summary.get("tokens"):
        lines.append(("tokens generated", f"{summary['tokens']:,}"))
    if summary.get("peak_memory_mib") is not None:
        lines.append(("peak memory", f"{summary['peak_memory_mib']:,.0f} MiB"))
    total = (summary.get("seconds") or {}).get("total")
    if total is not None:
        lines.append(("time", duration(total)))
    if summary.get("report"):
        lines.append(("report", str(summary["report"])))
    return lines


def _accuracy_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines about held-out accuracy."""
    lines = []
    for name in ("before", "after", "teacher"):
        if result := summary.get(name):
            count = f"{result['correct']} of {result['problems']}"
            lines.append((f"accuracy, {name}", _accuracy(result, count)))
    if best := summary.get("best"):
        chosen = f"step {best['step']}, chosen on these very problems: biased upwards"
        lines.append(("accuracy, best", _accuracy(best, chosen)))
        mean = summary["mean"]
        over = f"over {mean['checkpoints']} checkpoints"
        lines.append(("accuracy, mean", f"{mean['accuracy']:.1%} ({over})"))
    if majority := summary.get("majority"):
        answer = f"always {majority['answer']!r}"
        lines.append(("accuracy, majority", f"{majority['accuracy']:.1%} ({answer})"))
    if paired := summary.get("paired"):
        points, (low, high) = 100 * paired["difference"], paired["interval"]
        interval = f"95% {100 * low:+.1f} to {100 * high:+.1f}"
        counts = f"{paired['gained']} gained, {paired['lost']} lost"
        lines.append(("after - before", f"{points:+.1f} points ({interval}; {counts})"))
    return lines


def _accuracy(result: dict[str, Any], remark: str) -> str:
    low, high = result["interval"]
    return f"{result['accuracy']:.1%} (95% {low:.1%} to {high:.1%}; {remark})"


def duration(seconds: float) -> str:
    """Seconds as text: "48 s", "12 min 05 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def read_rows(path: Path) -> Rows:
    """The rows of a .jsonl file, none if there is no file; an incomplete last line is dropped.

    Raises UserError if another line is not valid JSON.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not valid JSON") from None
    return rows


def _open_rows(path: Path, resume_step: int | None) -> TextIO:
    """Open a file to append rows to: empty, or with the rows up to `resume_step`."""
    if resume_step is None:
        return open(path, "w", encoding="utf-8")
    kept = [row for row in read_rows(path) if row["step"] <= resume_step]
    replace_file(path, "".join(_json_line(row) for row in kept))
    return open(path, "a", encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: it has either its old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _append(file: TextIO, row: dict[str, Any]) -> None:
    file.write(_json_line(row))
    file.flush()
    os.fsync(file.fileno())  # no checkpoint may reach the disk before the rows up to it


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with NaN and infinity replaced by None, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
