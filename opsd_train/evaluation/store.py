"""The folder of an evaluation: its problems, completions, grades and scores.

config.yaml               what was evaluated, and all settings
problems.jsonl            set, problem (its id), question, answer, task, entry, task_config
generations.jsonl         set, problem, sample, prompt_tokens, tokens, finished, text; with several
                          processes one file each: generations.rank_N.jsonl
grades.jsonl              set, problem, sample, correct, answer, boxed, finished, tokens, reason
scores.json               the scores of each set
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from opsd_train.config.changes import changed_keys, flat
from opsd_train.config.errors import UserError
from opsd_train.config.load import to_yaml
from opsd_train.evaluation.scores import GradedSample
from opsd_train.evaluation.sets import EvalProblem
from opsd_train.evaluation.settings import EvalConfig
from opsd_train.reporting.metrics_log import read_rows, replace_file

FREE = (
    "settings.output_dir",
    "settings.grading.",
    "settings.model.device",
    "settings.sampling.batch_tokens",
    "settings.sampling.vllm_memory",
)
"""Keys, and sections, that generations do not depend on: they may change between two calls."""

Rows = list[dict[str, Any]]
Key = tuple[str, str, int]  # set, problem, sample


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation evaluates: config.yaml, and what a second call is compared with."""

    source: str
    """Model or run, as on the command line."""
    weights: str | None
    """Path of a run's weights within its folder; None for a model."""
    sets: list[str]
    settings: EvalConfig


class Store:
    """The files of one evaluation's folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def exists(self) -> bool:
        """Whether an evaluation was begun here."""
        return (self.folder / "problems.jsonl").is_file()

    def begin(self, evaluated: Evaluated, problems: Sequence[EvalProblem]) -> None:
        """Make the folder. problems.jsonl is written last: with it, the evaluation has begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / "config.yaml", to_yaml(evaluated))
        self._write("problems.jsonl", [dataclasses.asdict(problem) for problem in problems])

    def check_same(self, evaluated: Evaluated) -> None:
        """Raises UserError if the folder is of another evaluation; FREE keys may differ."""
        text = (self.folder / "config.yaml").read_text(encoding="utf-8")
        before, now = (flat(yaml.safe_load(t)) for t in (text, to_yaml(evaluated)))
        if changed := changed_keys(before, now, FREE):
            raise UserError(
                f"{self.folder} holds another evaluation: {changed}; set it back to go on with "
                "that one, or choose another folder: output_dir=..."
            )

    def problems(self) -> list[EvalProblem]:
        """All problems, in the order they were written."""
        return [EvalProblem(**row) for row in read_rows(self.folder / "problems.jsonl")]

    def generations(self) -> dict[Key, dict[str, Any]]:
        """The complete lines of all processes' generation files."""
        rows: dict[Key, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("generations*.jsonl")):
            # What follows the last newline is half written; it will be generated again.
            for line in path.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                rows.setdefault((row["set"], row["problem"], row["sample"]), row)
        return rows

    def grades(self) -> list[GradedSample]:
        """The graded samples; raises UserError if there is no grades.jsonl."""
        if not (self.folder / "grades.jsonl").is_file():
            raise UserError(f"{self.folder} has no grades.jsonl: no finished evaluation is there")
        return cast(list[GradedSample], read_rows(self.folder / "grades.jsonl"))

    def write_grades(self, rows: Sequence[GradedSample]) -> None:
        """Write grades.jsonl anew."""
        self._write("grades.jsonl", rows)

    def write_scores(self, scores: dict[str, Any]) -> None:
        """Write scores.json anew."""
        replace_file(self.folder / "scores.json", json.dumps(scores, indent=1) + "\n")

    def _write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        replace_file(self.folder / name, "".join(map(_line, rows)))


class GenerationFile:
    """The generations of one process, opened to append; use it as a context manager."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        name = "generations.jsonl" if size == 1 else f"generations.rank_{rank}.jsonl"
        path = folder / name
        if path.exists():  # cut off the line that a killed process left half written
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = open(path, "a", encoding="utf-8")

    def __enter__(self) -> GenerationFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: Rows) -> None:
        """Write a batch's rows; they are on disk when this returns."""
        self._file.write("".join(map(_line, rows)))
        self._file.flush()
        os.fsync(self._file.fileno())


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
