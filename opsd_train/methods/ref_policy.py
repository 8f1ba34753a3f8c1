"""The trained model with other weights: OPSD's teacher, GRPO's reference policy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from opsd_kernels.integrations.heads import LmHead
from opsd_train.distributed.fsdp import Snapshot
from opsd_train.model.policy import Policy


class RefPolicy:
    """A policy's model with `weights` that are one of:

    "initial"  as before training: adapters switched off, or a copy if all weights are trained
    "ema"      an exponential moving average of the trained weights with `ema_decay`
    "resync"   a copy of the trained weights, made again every `resync_every` steps
    "current"  the policy's own

    With adapters an average or a copy is of each adapter's matrices.
    """

    def __init__(
        self,
        policy: Policy,
        weights: str,
        *,
        ema_decay: float = 0.0,
        resync_every: int = 0,
        several_updates: bool = False,
        name: str = "ref_policy",
    ) -> None:
        """`several_updates`: the policy changes between `active` and the use of its hidden states.
        `name`: of its tensors in a checkpoint."""
        self._policy, self._weights, self._name = policy, weights, name
        self._decay, self._resync_every = ema_decay, resync_every
        moves = weights in ("ema", "resync")
        copied = moves or (weights == "initial" and not policy.has_adapters)
        self._snapshot = Snapshot(policy.core, policy.parameters) if copied else None
        self._head: LmHead | None = None
        self._own_head = copied or several_updates

    def active(self) -> AbstractContextManager[None]:
        """Within this context the policy's model has these weights.

        On exit the trained weights are restored bit for bit.
        """
        if self._snapshot is not None:
            return self._snapshot.applied()
        return self._policy.without_adapters() if self._weights == "initial" else nullcontext()

    def head(self) -> LmHead | None:
        """A copy of the LM head, or None where the policy's own head is the same.

        Call it within `active`, on every rank.
        """
        if self._own_head and (self._head is None or self._weights != "initial"):
            with torch.no_grad():
                self._head = self._policy.run([[0]], [[0]], self._copy_head)
        return self._head

    def after_step(self, step: int) -> None:
        """After an optimizer step of training step `step`, from 1: move the average towards the
        trained weights, decay * average + (1 - decay) * trained, or make the copy again."""
        if self._snapshot is None or self._weights == "initial":
            return
        if self._weights == "ema":
            self._snapshot.blend(self._decay)
        elif step % self._resync_every == 0:
            self._snapshot.blend(0.0)

    def state(self) -> dict[str, Tensor]:
        """The copied weights for a checkpoint; nothing where there is no copy."""
        values = self._snapshot.state() if self._snapshot else []
        return {f"{self._name}.{index}": value for index, value in enumerate(values)}

    def _copy_head(self, _hidden: Tensor, head: LmHead, _targets: Tensor) -> LmHead | None:
        if not head.weight.requires_grad:  # a frozen head is the policy's own
            return None
        dtype = self._policy.dtype
        bias = None if head.bias is None else head.bias.to(dtype, copy=True)
        return replace(head, weight=head.weight.to(dtype, copy=True), bias=bias)
