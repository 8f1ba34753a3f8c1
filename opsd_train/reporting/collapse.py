"""Warn of collapse early: when a metric leaves the band of its first steps.

`collapse.action` may make such a warning the end of the run.
"""

import copy
import math
import statistics
from typing import Any

from opsd_train.config.schema import CollapseConfig

RECENT = 5  # steps that the running mean covers
# Lower bounds on the standard deviation: after flat first steps noise must not cause a warning.
MIN_RELATIVE_STD = 0.05
MIN_STD = 1e-3

_SHORTER = "look at the samples; if they got worse, lower optim.lr or go back to a checkpoint"
_LONGER = "look at the samples for repetition; lower optim.lr or rollout.max_new_tokens"
_ENTROPY_LOW = (
    "the student settles on a few answers: lower optim.lr, or stop at an earlier checkpoint"
)
_ENTROPY_HIGH = "the student's text is becoming random: lower optim.lr, or go back to a checkpoint"
_DIVERGING = "the student moves away from its teacher: lower optim.lr, or set loss.token_clip"
_CLIPPED = "more and more of the loss is clipped away: lower optim.lr, or raise loss.token_clip"
_SAMPLER_DRIFT = (
    "the sampler drifts away from the trainer: check that it has the newest adapter; with "
    "rollout.ahead=1, lower optim.lr"
)

# The advice for each side of the band. A falling divergence is the aim of training: no warning.
MONITORED = {
    "completion_length": {"below": _SHORTER, "above": _LONGER},
    "student_entropy": {"below": _ENTROPY_LOW, "above": _ENTROPY_HIGH},
    "entropy": {"below": _ENTROPY_LOW, "above": _ENTROPY_HIGH},
    "divergence": {"above": _DIVERGING},
    "clipped_mass": {"above": _CLIPPED},
    "sampler_mismatch": {"above": _SAMPLER_DRIFT},
    "importance": {"below": _SAMPLER_DRIFT, "above": _SAMPLER_DRIFT},
}


class CollapseMonitor:
    """Warns when a metric's running mean leaves mean ± width * std of its first steps."""

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self._metrics: dict[str, dict[str, Any]] = {}

    def observe(self, step: int, row: dict[str, Any]) -> list[str]:
        """The warnings after this step, one line each: one each time a metric leaves its band."""
        warnings = [self._check(step, name, row[name]) for name in MONITORED if _usable(row, name)]
        return [warning for warning in warnings if warning]

    def state_dict(self) -> dict[str, Any]:
        """The metrics seen so far, for a checkpoint; JSON."""
        return copy.deepcopy(self._metrics)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._metrics = copy.deepcopy(state)

    def _check(self, step: int, name: str, value: float) -> str | None:
        seen = self._metrics.setdefault(name, {"first": [], "recent": [], "outside": None})
        seen["recent"] = [*seen["recent"], value][-RECENT:]
        if len(seen["first"]) < self.config.first_steps:
            seen["first"].append(value)
            return None
        center = statistics.fmean(seen["first"])
        spread = max(statistics.pstdev(seen["first"]), MIN_RELATIVE_STD * abs(center), MIN_STD)
        now = statistics.fmean(seen["recent"])
        deviation = (now - center) / spread
        side = "above" if deviation > 0 else "below"
        if abs(deviation) < self.config.width / 2:
            seen["outside"] = None  # only well inside: wavering at the edge warns once
        if (
            abs(deviation) <= self.config.width
            or side == seen["outside"]
            or side not in MONITORED[name]
        ):
            return None
        seen["outside"] = side
        low, high = center - self.config.width * spread, center + self.config.width * spread
        return (
            f"step {step}: {name} is {now:.4g} (mean of {len(seen['recent'])} steps), {side} the "
            f"band {max(low, 0.0):.4g} to {high:.4g} of its first {self.config.first_steps} "
            f"steps; {MONITORED[name][side]}"
        )


def _usable(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is not None and math.isfinite(row[name])
