"""What an earlier part of a study has finished, from its results.json: it need not be run again.

A night's study can be run in pieces on machines that keep nothing: each piece commits results.json,
and the next begins with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Plan, PlannedRun, PlannedSampling, fingerprint
from opsd_train.config.errors import UserError


def digest(run: PlannedRun) -> str:
    """Equal for runs that train alike."""
    return hashlib.sha256(fingerprint(run.config).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Earlier:
    """Records of finished runs and samplings by id, as results.json has them."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    samplings: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, Any] | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Earlier:
        """Those of a results.json; None: there is none. Raises UserError if it cannot be read."""
        if path is None:
            return cls()
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--earlier {path}: {error}") from None
        device = {"device": results["device"]}  # of records from before each had its own
        return cls(
            {name: device | record for name, record in _finished(results["runs"]).items()},
            _finished(results["samplings"]),
            results["memory"],
            results["notes"],
        )

    def run(self, run: PlannedRun) -> dict[str, Any] | None:
        """The record of a run with the same settings."""
        record = self.runs.get(run.id)
        return record if record and record.get("digest") == digest(run) else None

    def sampling(self, sampled: PlannedSampling, plan: Plan) -> dict[str, Any] | None:
        """The record of a sampling of such a run."""
        record = self.samplings.get(sampled.id)
        whose = plan.runs[sampled.run or sampled.problems_of]
        return record if record and self.run(whose) else None

    def without(self, ids: Iterable[str]) -> Earlier:
        """The same without these runs: their weights are needed, which no record has."""
        left_out = set(ids)
        runs = {name: record for name, record in self.runs.items() if name not in left_out}
        return replace(self, runs=runs)


def _finished(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: r for name, r in records.items() if r["status"] == "finished"}
