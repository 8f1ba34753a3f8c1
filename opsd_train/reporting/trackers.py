"""Experiment trackers a run may also log to; their packages are not among our requirements."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from opsd_train.config.errors import UserError

PROJECT = "opsd_train"


class Tracker:
    """One run at W&B or trackio, whose functions are called alike, named after the run folder."""

    def __init__(self, module: ModuleType, run_dir: Path, config: dict[str, Any]) -> None:
        self._module = module
        told = {"project": PROJECT, "name": run_dir.name, "config": config}
        if module.__name__ == "trackio":
            module.init(**told)
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            module.init(**told, dir=str(run_dir))
        except module.Error as error:  # not logged in, no network
            raise UserError(
                f"report.trackers: wandb does not start: {error} (or set WANDB_MODE=offline)"
            ) from None

    def log(self, step: int, row: dict[str, Any]) -> None:
        """The numbers of a row; lists and texts stay in metrics.jsonl."""
        self._module.log(numbers(row), step=step)

    def finish(self) -> None:
        self._module.finish()


def open_trackers(
    names: Sequence[str], run_dir: str | Path, config: dict[str, Any]
) -> list[Tracker]:
    """The trackers of report.trackers; each start of a run, resumed or not, is a run there."""
    modules = [_import(name) for name in names]
    return [Tracker(module, Path(run_dir), config) for module in modules]


def numbers(row: dict[str, Any]) -> dict[str, int | float]:
    """The scalar metrics of a row."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"report.trackers: {name} is not installed; pip install {name}, or take it out"
        ) from None
