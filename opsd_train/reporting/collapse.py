"""Early warning of collapse: metrics that leave the band of their first steps."""

import copy
import math
import statistics
from typing import Any

from opsd_train.config.schema import CollapseConfig

RECENT = 5
# A start that happens to be flat must not make noise a warning.
LEAST_RELATIVE_STD = 0.05
LEAST_STD = 1e-3

_SHRINK = "look at the samples; if they got worse, lower optim.lr or go back to a checkpoint"
_GROW = "look at the samples for repetition; lower optim.lr or rollout.max_new_tokens"
_SURE = "the student commits to few answers: lower optim.lr, or stop at an earlier checkpoint"
_UNSURE = "the student is losing its language: lower optim.lr, or go back to a checkpoint"
_APART = "the student moves away from its teacher: lower optim.lr, or set loss.token_clip"
_CLIPPED = "more and more of the loss is clipped away: lower optim.lr, or raise loss.token_clip"
_ELSEWHERE = "the sampler drifts away from the trainer: is its adapter the newest one?"

# Advice by side. A divergence that falls is what training is for: no warning below.
MONITORED = {
    "completion_length": {"below": _SHRINK, "above": _GROW},
    "student_entropy": {"below": _SURE, "above": _UNSURE},
    "entropy": {"below": _SURE, "above": _UNSURE},
    "divergence": {"above": _APART},
    "clipped_mass": {"above": _CLIPPED},
    "sampler_mismatch": {"above": _ELSEWHERE},
    "importance": {"below": _ELSEWHERE, "above": _ELSEWHERE},
}


class CollapseMonitor:
    """Compares a running mean of each watched metric with mean ± width x std of its first steps."""

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self._metrics: dict[str, dict[str, Any]] = {}

    def observe(self, step: int, row: dict[str, Any]) -> list[str]:
        """Warnings after this step, one line each; one for each time a metric leaves its band."""
        warnings = [self._judge(step, name, row[name]) for name in MONITORED if _usable(row, name)]
        return [warning for warning in warnings if warning]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON takes it."""
        return copy.deepcopy(self._metrics)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._metrics = copy.deepcopy(state)

    def _judge(self, step: int, name: str, value: float) -> str | None:
        known = self._metrics.setdefault(name, {"first": [], "recent": [], "outside": None})
        known["recent"] = [*known["recent"], value][-RECENT:]
        if len(known["first"]) < self.config.first_steps:
            known["first"].append(value)
            return None
        middle = statistics.fmean(known["first"])
        spread = max(statistics.pstdev(known["first"]), LEAST_RELATIVE_STD * abs(middle), LEAST_STD)
        now = statistics.fmean(known["recent"])
        away = (now - middle) / spread
        side = "above" if away > 0 else "below"
        if abs(away) < self.config.width / 2:
            known["outside"] = None  # only well inside, so that the edge does not warn twice
        if (
            abs(away) <= self.config.width
            or side == known["outside"]
            or side not in MONITORED[name]
        ):
            return None
        known["outside"] = side
        low, high = middle - self.config.width * spread, middle + self.config.width * spread
        return (
            f"step {step}: {name} is {now:.4g} (mean of {len(known['recent'])} steps), {side} the "
            f"band {max(low, 0.0):.4g} to {high:.4g} of its first {self.config.first_steps} "
            f"steps; {MONITORED[name][side]}"
        )


def _usable(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is not None and math.isfinite(row[name])
