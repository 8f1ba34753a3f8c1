"""What of a recipe may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from opsd_train.config.errors import UserError

FREE = (
    # where and how often things are written, measured and warned of
    "output_dir",
    "checkpoint.",
    "evaluation.",
    "report.",
    "collapse.",
    # how the same sums are cut and where they run; results move by rounding only
    "micro_batch_tokens",
    "model.device",
    "model.gradient_checkpointing",
    "rollout.batch_tokens",
    "rollout.vllm_memory",
)
"""Keys, and sections, that a resumed run may have other values of."""

_SHOWN = 3


def refuse_changes(old: str, new: str, checkpoint: Path) -> None:
    """Raise if recipe `new` would not go on with the training that `old` began."""
    before, after = flat(yaml.safe_load(old)), flat(yaml.safe_load(new))
    free = FREE + (("steps",) if after.get("optim.schedule") == "constant" else ())
    changed = [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in before | after
        if before.get(key) != after.get(key) and not _matches(key, free)
    ]
    if not changed:
        return
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise UserError(
        f"the recipe is not the one of {checkpoint}: {'; '.join(changed[:_SHOWN])}{more}; "
        "set it back, or start a new run with another output_dir"
    )


def _matches(key: str, free: tuple[str, ...]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in free)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ...}; lists are values."""
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.")
    return found
