"""A batch of sequences that a model goes on with: left-padded prompts, a cache, the next logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opsd_train.rollout.kv_cache import drop_rows, preallocate


class Sequences:
    """Sequences of one model, each with `room` for so many more tokens.

    logits  (B, V) float32 of the next token of each
    """

    def __init__(
        self,
        core: PreTrainedModel,
        prompts: Sequence[list[int]],
        room: int,
        pad_id: int,
        dtype: torch.dtype,
    ) -> None:
        """Read the prompts, each distinct one once; `dtype`: of the cache."""
        self._core = core
        device = next(core.parameters()).device
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        width = max(map(len, distinct))
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in distinct])
        mask = torch.ones(len(distinct), width + room, dtype=torch.long)
        for row, prompt in enumerate(distinct):
            mask[row, : width - len(prompt)] = 0
        ids, mask = ids.to(device), mask.to(device)
        position = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=core.config)
        logits = self._forward(ids, mask[:, :width], position)
        index = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
        preallocate(self._cache, rows, room, dtype)
        self.logits, self._mask = logits[rows], mask[rows]
        self._length = width
        self._position = self._mask[:, :width].sum(-1, keepdim=True)

    def drop(self, ended: Sequence[int]) -> list[int]:
        """Let go of these rows; returns which of the rows are now 0, 1, ..."""
        kept = drop_rows(self._cache, len(self._mask), list(ended), self._mask.device)
        self._mask, self._position = self._mask[kept], self._position[kept]
        return kept

    def extend(self, tokens: Tensor) -> None:
        """Go on with a token in each row, (B,)."""
        self._length += 1
        self.logits = self._forward(tokens[:, None], self._mask[:, : self._length], self._position)
        self._position += 1

    def _forward(self, ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        """(B, V) float32 logits of the last position."""
        output = self._core(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()
