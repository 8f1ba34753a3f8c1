"""A GPU that has too little memory: one line with what needs less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config

PREDICTION = "--dry-run predicts each phase's peak for models like Llama"


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Raise UserError instead of PyTorch's OutOfMemoryError, ending with what `advice` returns."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # What could not be had, and of how much; PyTorch's own advice comes after that.
        what = ". ".join(str(error).split(". ")[:3]).removesuffix(".")
        raise UserError(f"{what}; {advice()}") from error


def training_advice(config: Config, phase: str | None) -> str:
    """What needs less memory in a phase of training; None: a time between phases."""
    return f"{' or '.join(_ways(config, phase))}; {PREDICTION}"


def _ways(config: Config, phase: str | None) -> Iterator[str]:
    """What this recipe can still change."""
    rollout = config.rollout
    if rollout.engine == "vllm":
        yield f"lower rollout.vllm_memory ({rollout.vllm_memory:g})"
    if rollout.engine == "transformers" and phase in ("rollout", "evaluate"):
        yield f"lower rollout.batch_tokens ({rollout.batch_tokens})"
    if phase in ("evaluate", "teacher", "student"):  # evaluations have a divergence
        yield f"lower micro_batch_tokens ({config.micro_batch_tokens})"
    if phase == "student" and not config.model.gradient_checkpointing:
        yield "set model.gradient_checkpointing=true"
    if phase in ("load", "optimizer") and config.lora is None:
        yield "train adapters (lora)"
    yield "shard the weights over more processes (torchrun)"
