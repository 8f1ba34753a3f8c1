"""Rollouts with vLLM on the same device: its own copy of the base model, and our adapter.

On a GPU vLLM sleeps between rollouts: at level 1, which moves its weights to host memory (level 2
would discard the base model). On a CPU it is a process of its own, which does not sleep.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from opsd_train.config import schema
from opsd_train.config.errors import UserError
from opsd_train.distributed.fsdp import full_tensor
from opsd_train.model.adapters import trained_weights, write_adapter
from opsd_train.rollout.request import Completion, Request, Sampling
from opsd_train.rollout.stop import stop_ids
from opsd_train.rollout.vllm_model import VllmModel, base_weights, import_vllm


class VllmEngine:
    """vLLM with the adapter of the policy in training.

    `scratch`: a folder of this rank's own. `max_model_len`: tokens of a prompt and its completion.
    Every rank makes every call. Raises UserError without an adapter, and where vLLM is missing or
    does not start.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: schema.EngineConfig,
        *,
        model_config: schema.ModelConfig,
        scratch: Path,
        max_model_len: int,
        seed: int,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise UserError(
                "rollout.engine=vllm hands the adapter over; full fine-tuning (lora: null) needs "
                "rollout.engine=transformers"
            )
        import_vllm()  # fails before the base model is written to disk
        self._model = model
        self._scratch = scratch.resolve()  # vLLM may take a relative path for a name on the hub
        self._generator = VllmModel(
            base_weights(model_config, tokenizer, self._scratch),
            dtype=model_config.dtype,
            device=model.device,
            stop_ids=stop_ids(tokenizer, model.get_base_model().generation_config, config),
            max_model_len=max_model_len,
            memory=config.vllm_memory,
            seed=seed,
            adapter_rank=model.active_peft_config.r,
            sleeps=model.device.type == "cuda",
        )
        self._ids = itertools.count(1)
        self._folder: Path | None = None
        self.sync()

    def sync(self) -> None:
        """Write the adapter as it is now under a new name, for the next rollout to load."""
        number = next(self._ids)
        old, self._folder = self._folder, self._scratch / f"adapter-{number}"
        trained = trained_weights(self._model)
        weights = {name: full_tensor(p.detach()) for name, p in trained.items()}
        write_adapter(self._model, weights, self._folder)
        if old is not None:
            shutil.rmtree(old)
        self._generator.adapt(self._folder, number)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order, all with the adapter of the last sync."""
        return self._generator.generate(requests, sampling)

    def close(self) -> None:
        """End vLLM and free what it holds."""
        self._generator.close()
