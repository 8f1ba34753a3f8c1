"""The training methods, one module each; `METHODS` maps a recipe's `method` to its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_train.config.schema import Config
from opsd_train.data.fingerprint import Fingerprint
from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext
from opsd_train.methods.base import Method
from opsd_train.methods.context_distill import ContextDistill
from opsd_train.methods.distill import Distill
from opsd_train.methods.grpo import Grpo
from opsd_train.methods.opsd import Opsd
from opsd_train.methods.sft import Sft
from opsd_train.methods.star import Star
from opsd_train.methods.teachers import make_teachers
from opsd_train.model.policy import Policy

METHODS: dict[str, type[Method]] = {
    "opsd": Opsd,
    "sft": Sft,
    "grpo": Grpo,
    "distill": Distill,
    "star": Star,
    "context_distill": ContextDistill,
}


def make_method(
    config: Config,
    policy: Policy,
    tokenizer: Any,
    problems: Sequence[Problem],
    data: Fingerprint,
    context: DistributedContext,
    shard_mode: str,
) -> Method:
    """Build the recipe's method; for `distill`, its teachers too: see `make_teachers`."""
    if config.distill is None:
        return METHODS[config.method](config, policy)
    teachers = make_teachers(config, policy, tokenizer, problems, data, context, shard_mode)
    return Distill(config, policy, teachers)
