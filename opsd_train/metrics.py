"""What a run writes and shows while it goes: metrics, samples, TensorBoard, the progress bar."""

import json
import math
import os
import shutil
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

# Shown after each step where the row has them; short, so that the bar fits in 80 columns.
SHOWN = {
    "loss": "loss {:.4f}",
    "divergence": "div {:.4f}",
    "accuracy": "acc {:.0%}",
    "tokens_per_second": "{:.0f} tok/s",
}
LONGEST_CELL = 200


class RunLogger:
    """Writes a run folder's metrics.jsonl, samples.jsonl, summary.json and TensorBoard events.

    On a terminal it draws a progress bar above which print() still works; elsewhere it prints one
    line per step. A run that starts in a used folder replaces these files.
    """

    def __init__(self, run_dir: str | Path, total_steps: int, console: Console | None = None):
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.console = console or Console()
        self._recent_seconds = deque(maxlen=10)
        self._progress = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            console=self.console,
        )

    def __enter__(self) -> "RunLogger":
        # Imported here because it brings torch with it.
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(self.run_dir / "tensorboard", ignore_errors=True)
        self._metrics = open(self.run_dir / "metrics.jsonl", "w", encoding="utf-8")
        self._samples = open(self.run_dir / "samples.jsonl", "w", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"))
        self._task = self._progress.add_task("training", total=self.total_steps, shown="")
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
        self._samples.close()
        self._tensorboard.close()

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Records one optimizer step and shows it."""
        _append(self._metrics, {"step": step} | row)
        for name, value in row.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(f"train/{name}", value, step)
        self._tensorboard.flush()

        shown = [
            form.format(row[name]) for name, form in SHOWN.items() if row.get(name) is not None
        ]
        if "seconds" in row:
            self._recent_seconds.append(row["seconds"])
            pace = sum(self._recent_seconds) / len(self._recent_seconds)
            shown.append(f"{duration(pace * (self.total_steps - step))} left")
        if self.console.is_terminal:
            self._progress.update(self._task, completed=step, shown="  ".join(shown))
        else:
            print(f"step {step}/{self.total_steps}  " + "  ".join(shown), file=self.console.file)
            self.console.file.flush()

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Records sample completions; on a terminal also shows them as a table."""
        for row in rows:
            _append(self._samples, {"step": step} | row)
        if not self.console.is_terminal or not rows:
            return
        table = Table(title=f"step {step}", show_lines=True, title_justify="left")
        for name in ("question", "completion", "answer"):
            table.add_column(name, overflow="fold")
        table.add_column("right")
        table.add_column("divergence", justify="right")
        for row in rows:
            table.add_row(
                _cell(row["question"]),
                _cell(row["completion"]),
                _cell(row["answer"]),
                Text("yes", "green") if row["correct"] else Text("no", "red"),
                f"{row['divergence']:.4f}",
            )
        self.console.print(table)

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all, and prints the result."""
        target = self.run_dir / "summary.json"
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(_finite(summary), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)
        lines = summary_lines(summary)
        width = max((len(label) for label, _ in lines), default=0)
        for label, value in lines:
            self.console.print(f"{label:{width}}  {value}", markup=False, soft_wrap=True)


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A summary as (label, value) lines; what the run did not reach is left out."""
    lines = [("status", f"{summary['status']} after {summary['steps']} steps")]
    for name in ("before", "after", "teacher"):
        result = summary.get(name)
        if result:
            low, high = result["interval"]
            lines.append(
                (
                    f"accuracy, {name}",
                    f"{result['accuracy']:.1%} (95% {low:.1%} to {high:.1%}; "
                    f"{result['correct']} of {result['problems']})",
                )
            )
    majority = summary.get("majority")
    if majority:
        line = f"{majority['accuracy']:.1%} (always {majority['answer']!r})"
        lines.append(("accuracy, majority", line))
    paired = summary.get("paired")
    if paired:
        low, high = paired["interval"]
        lines.append(
            (
                "after - before",
                f"{100 * paired['difference']:+.1f} points (95% {100 * low:+.1f} to "
                f"{100 * high:+.1f}; {paired['gained']} gained, {paired['lost']} lost)",
            )
        )
    before, after = summary.get("divergence_before"), summary.get("divergence_after")
    if before is not None and after is not None:
        lines.append(("divergence", f"{before:.4f} before, {after:.4f} after"))
    if summary.get("tokens") is not None:
        lines.append(("tokens generated", f"{summary['tokens']:,}"))
    if summary.get("peak_memory_mib") is not None:
        lines.append(("peak memory", f"{summary['peak_memory_mib']:,.0f} MiB"))
    total = (summary.get("seconds") or {}).get("total")
    if total is not None:
        lines.append(("time", duration(total)))
    if summary.get("report"):
        lines.append(("report", str(summary["report"])))
    return lines


def duration(seconds: float) -> str:
    """Seconds for people: "48 s", "12 min 05 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _append(file: Any, row: dict[str, Any]) -> None:
    # Flushed line by line: whatever ends the run, the steps so far can be read.
    file.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")
    file.flush()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; both become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(text: str) -> Text:
    """A model's text for the terminal: cut, never read as markup, no control characters."""
    if len(text) > LONGEST_CELL:
        text = text[: LONGEST_CELL - 1] + "…"
    return Text("".join(c if c.isprintable() or c == "\n" else "�" for c in text))
