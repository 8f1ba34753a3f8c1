"""Rollouts with vLLM on the same device: its own copy of the base model, and our adapter.

On a GPU vLLM sleeps between rollouts: at level 1, which moves its weights to host memory (level 2
would discard the base model). On a CPU it is a process of its own, which does not sleep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from opsd_train.config.engine_schema import EngineConfig
from opsd_train.config.schema import ModelConfig
from opsd_train.rollout.adapter_folders import AdapterFolders
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
        config: EngineConfig,
        *,
        model_config: ModelConfig,
        scratch: Path,
        max_model_len: int,
        seed: int,
    ) -> None:
        self._adapters = AdapterFolders(model, scratch, config.engine)
        import_vllm()  # fails before the base model is written to disk
        core: Any = self._adapters.model.get_base_model()
        self._generator = VllmModel(
            base_weights(model_config, tokenizer, scratch.resolve()),
            dtype=model_config.dtype,
            device=core.device,
            stop_ids=stop_ids(tokenizer, core.generation_config, config),
            max_model_len=max_model_len,
            memory=config.vllm_memory,
            seed=seed,
            adapter_rank=self._adapters.rank,
            sleeps=core.device.type == "cuda",
        )
        self.sync()

    def sync(self) -> None:
        """Hand the adapter over as it is now, under a new name, for the next rollout."""
        self._generator.adapt(*self._adapters.write())
        self._adapters.remove_old()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order, all with the adapter of the last sync."""
        return self._generator.generate(requests, sampling)

    def close(self) -> None:
        """End vLLM and free what it holds."""
        self._generator.close()
