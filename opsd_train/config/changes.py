"""Which keys of a recipe changed, and which of them may when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opsd_train.config.errors import UserError

FREE = (
    # where and how often things are written, measured and warned of
    "output_dir",
    "distill.cache",  # what is in it is compared
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
    "rollout.servers",
    "distill.servers",
)
"""Keys, and sections (with a final dot), that may have other values in a resumed run."""

_SHOWN = 3


def refuse_changes(old: str, new: str, checkpoint: Path) -> None:
    """Raises UserError if recipe `new` would not continue the training that `old` began.

    Both are YAML. A constant learning rate leaves the number of steps free too.
    """
    before, after = flat(yaml.safe_load(old)), flat(yaml.safe_load(new))
    free = FREE + (("steps",) if after.get("optim.schedule") == "constant" else ())
    if changed := changed_keys(before, after, free):
        raise UserError(
            f"the recipe is not the one of {checkpoint}: {changed}; set it back, or start a new "
            "run with another output_dir"
        )


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], free: Sequence[str]) -> str:
    """The keys that differ between two `flat` configurations: "seed was 0 and is 1; ...".

    Three are named, the others counted. Keys and sections in `free` may change; the text is empty
    if nothing else did.
    """
    changed = [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not _matches(key, free)
    ]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return "; ".join(changed[:_SHOWN]) + more


def _matches(key: str, free: Sequence[str]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in free)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as {"optim.lr": 0.001, ...}; lists, and sections without keys, are values."""
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.")
    return found
