"""Experiment trackers that a run can also log to; their packages are optional."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from opsd_train.config.errors import UserError

PROJECT = "opsd_train"


class Tracker:
    """One run in W&B or trackio, which have the same functions; it is named after the run folder.

    Raises UserError if W&B does not start.
    """

    def __init__(self, module: ModuleType, run_dir: Path, config: dict[str, Any]) -> None:
        self._module = module
        options = {"project": PROJECT, "name": run_dir.name, "config": config}
        if module.__name__ == "trackio":
            module.init(**options)
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            module.init(**options, dir=str(run_dir))
        except module.Error as error:  # not logged in, no network
            raise UserError(
                f"report.trackers: wandb does not start: {error} (or set WANDB_MODE=offline)"
            ) from None

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Log the numbers of a row; lists and texts are in metrics.jsonl only."""
        self._module.log(numbers(row), step=step)

    def finish(self) -> None:
        """End the tracker's run."""
        self._module.finish()


def open_trackers(
    names: Sequence[str], run_dir: str | Path, config: dict[str, Any]
) -> list[Tracker]:
    """Start the trackers of report.trackers; a resumed run is a new run there.

    Raises UserError if one is not installed or does not start.
    """
    modules = [_import(name) for name in names]
    return [Tracker(module, Path(run_dir), config) for module in modules]


def numbers(row: dict[str, Any]) -> dict[str, int | float]:
    """The numbers among a row's metrics."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"report.trackers: {name} is not installed; pip install {name}, or leave it out"
        ) from None
