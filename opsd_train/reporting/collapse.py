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
# After restless first steps mean - width * std may be below zero, where no monitored metric gets.
LEAST_SHARE = 0.25

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

_NOTHING = (
    "no sample counted in the loss: if none is right, make the problems easier, raise "
    "rollout.max_new_tokens or go back to a checkpoint"
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
TRAINED = "trained"


class CollapseMonitor:
    """Warns when a metric's running mean leaves mean ± width * std of its first steps.

    A fall below LEAST_SHARE of that mean is outside in any case. Warns too when as many steps in a
    row have trained on nothing: then no other metric can tell.
    """

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self._metrics: dict[str, dict[str, Any]] = {}

    def observe(self, step: int, row: dict[str, Any]) -> list[str]:
        """The warnings after this step, one line each: one each time a metric leaves its band."""
        warnings = [self._check(step, name, row[name]) for name in MONITORED if _usable(row, name)]
        warnings.append(self._check_trained(step, row.get("trained")))
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
        low, center, high = self._band(seen["first"])
        now = statistics.fmean(seen["recent"])
        side = "above" if now > center else "below"
        # How much of the way from the center to the band's edge.
        way = (now - center) / ((high if side == "above" else low) - center)
        if way < 0.5:
            seen["outside"] = None  # only well inside: wavering at the edge warns once
        if way <= 1 or side == seen["outside"] or side not in MONITORED[name]:
            return None
        seen["outside"] = side
        return (
            f"step {step}: {name} is {now:.4g} (mean of {len(seen['recent'])} steps), {side} the "
            f"band {max(low, 0.0):.4g} to {high:.4g} of its first {self.config.first_steps} "
            f"steps; {MONITORED[name][side]}"
        )

    def _check_trained(self, step: int, share: float | None) -> str | None:
        count, seen = self.config.first_steps, self._metrics.setdefault(TRAINED, {"idle": 0})
        seen["idle"] = seen["idle"] + 1 if share == 0 else 0
        if seen["idle"] != count:  # once each time
            return None
        return f"step {step}: {TRAINED} is 0 in each of the last {count} steps; {_NOTHING}"

    def _band(self, first: list[float]) -> tuple[float, float, float]:
        """Lower edge, mean and upper edge."""
        center = statistics.fmean(first)
        spread = max(statistics.pstdev(first), MIN_RELATIVE_STD * abs(center), MIN_STD)
        width = self.config.width
        down = max((1 - LEAST_SHARE) * center, width * MIN_STD)
        return center - min(width * spread, down), center, center + width * spread


def _usable(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is not None and math.isfinite(row[name])
