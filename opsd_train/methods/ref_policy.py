"""The same model with other weights: OPSD's teacher, GRPO's reference policy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from opsd_train.distributed.fsdp import Snapshot
from opsd_train.model.families import LmHead
from opsd_train.model.policy import Policy


class RefPolicy:
    """`weights`: "initial" (adapters off, or a frozen copy where all weights are trained), "ema"
    (their moving average) or "current" (the policy's own)."""

    def __init__(self, policy: Policy, weights: str, ema_decay: float = 0.0) -> None:
        self._policy, self._weights, self._decay = policy, weights, ema_decay
        copied = weights == "ema" or (weights == "initial" and not policy.has_adapters)
        self._snapshot = Snapshot(policy.core, policy.parameters) if copied else None
        self._head: LmHead | None = None

    def active(self) -> AbstractContextManager:
        """The model with these weights; what was trained comes back bit for bit."""
        if self._snapshot is not None:
            return self._snapshot.applied()
        return self._policy.without_adapters() if self._weights == "initial" else nullcontext()

    def head(self) -> LmHead | None:
        """Within `active`: a copy of a head that differs from the policy's; None: it is the same.

        Every rank must call it.
        """
        if self._snapshot is not None and (self._head is None or self._weights == "ema"):
            with torch.no_grad():
                self._head = self._policy.run([[0]], [[0]], self._copy)
        return self._head

    def after_step(self) -> None:
        if self._weights == "ema":
            self._snapshot.blend(self._decay)

    def state(self) -> dict[str, Tensor]:
        values = self._snapshot.state() if self._snapshot else []
        return {f"ref_policy.{index}": value for index, value in enumerate(values)}

    def _copy(self, _hidden: Tensor, head: LmHead, _targets: Tensor) -> LmHead | None:
        if not head.weight.requires_grad:  # adapters leave the head alone
            return None
        dtype = self._policy.dtype
        bias = None if head.bias is None else head.bias.to(dtype, copy=True)
        return replace(head, weight=head.weight.to(dtype, copy=True), bias=bias)
