"""Generation with vLLM on the same device: a copy of the base model, and the adapter handed over.

On a GPU vLLM sleeps between rollouts (level 1: its weights wait in the host's memory; level 2
would destroy the base). Without a GPU it is a process of its own, and stays as it is.
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
from opsd_train.rollout.request import Completion, Request, Sampling
from opsd_train.rollout.stop import stop_ids
from opsd_train.rollout.vllm_model import VllmModel, base_weights, import_vllm


class VllmEngine:
    """`scratch` is a folder of this process's own; `max_model_len` holds prompt and completion.

    Where there are several processes, all of them call `sync` together.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: schema.RolloutConfig,
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
        import_vllm()  # before the base is written out for it
        self._model = model
        self._scratch = scratch.resolve()  # else vLLM might take it for a name on the hub
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
        """Write the adapter as it is now, under a new name; the next rollout loads it."""
        number = next(self._ids)
        old, self._folder = self._folder, self._scratch / f"adapter-{number}"
        _write_adapter(self._model, self._folder)
        if old is not None:
            shutil.rmtree(old)
        self._generator.adapt(self._folder, number)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order, all with the adapter of the last sync."""
        return self._generator.generate(requests, sampling)

    def close(self) -> None:
        """End vLLM and free what it holds."""
        self._generator.close()


def _write_adapter(model: PeftModel, folder: Path) -> None:
    """As peft writes it, from whole tensors where the model's are sharded."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {name: full_tensor(tensor) for name, tensor in trained.items()}
    # Without embeddings: peft would ask the hub whether they were resized.
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
