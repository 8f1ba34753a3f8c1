"""A GPU that has too little memory: one line with what needs less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Raise UserError instead of PyTorch's OutOfMemoryError, with the end that `advice` returns."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # What could not be had, and of how much; PyTorch's own advice comes after that.
        what = ". ".join(str(error).split(". ")[:3]).removesuffix(".")
        raise UserError(f"{what}; {advice()}") from error


def training_advice(config: Config, phase: str | None) -> str:
    """What needs less memory in a phase of training; None is a time between phases."""
    passes = f"micro_batch_tokens ({config.micro_batch_tokens})"
    samples = f"rollout.batch_tokens ({config.rollout.batch_tokens})"
    if config.rollout.engine == "vllm":
        samples = f"rollout.vllm_memory ({config.rollout.vllm_memory:g})"
    if phase in ("load", "optimizer"):
        advice = "train adapters (lora) or shard the weights over more processes (torchrun)"
    elif phase == "evaluate":  # samples, and their divergence
        advice = f"lower {samples} or {passes}"
    elif phase == "rollout":
        advice = f"lower {samples}"
    elif phase == "teacher" or config.model.gradient_checkpointing:
        advice = f"lower {passes}"
    else:
        advice = f"lower {passes} or set model.gradient_checkpointing=true"
    return f"{advice}; --dry-run predicts the peak of each phase"
