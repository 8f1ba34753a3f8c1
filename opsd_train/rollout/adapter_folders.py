"""The adapter in training, written to a new folder each time an engine is to load it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from opsd_train.config.errors import UserError
from opsd_train.distributed.fsdp import full_tensor
from opsd_train.model.adapters import adapters_are_off, trained_weights, write_adapter


class AdapterFolders:
    """Folders adapter-1, adapter-2, ... in `scratch`, in PEFT's format.

    `engine`: the name in the error. `writes`: whether this rank writes; one that does not only
    helps to gather the weights. Raises UserError without an adapter.
    """

    def __init__(self, model: nn.Module, scratch: Path, engine: str, writes: bool = True) -> None:
        if not isinstance(model, PeftModel):
            raise UserError(
                f"rollout.engine={engine} hands the adapter over; full fine-tuning (lora: null) "
                "needs rollout.engine=transformers"
            )
        self.model, self._writes = model, writes
        self._scratch = scratch.resolve()  # vLLM may take a relative path for a name on the hub
        self._numbers = itertools.count(1)
        self._folders: list[Path] = []
        self.rank: int = model.active_peft_config.r

    def write(self) -> tuple[Path, int]:
        """Write the adapter as it is now; returns its folder and number. Every rank calls it.

        While it is switched off, one that adds nothing is written.
        """
        number = next(self._numbers)
        folder = self._scratch / f"adapter-{number}"
        trained = trained_weights(self.model)
        weights = {name: full_tensor(p.detach()) for name, p in trained.items()}
        if adapters_are_off(self.model):
            weights = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        if self._writes:
            write_adapter(self.model, weights, folder)
            self._folders.append(folder)
        return folder, number

    def remove_old(self) -> None:
        """Remove all folders but the newest."""
        for folder in self._folders[:-1]:
            shutil.rmtree(folder)
        del self._folders[:-1]
