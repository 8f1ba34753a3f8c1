"""Generation with vLLM on the same device: a copy of the base model, and the adapter handed over.

On a GPU vLLM sleeps between rollouts (level 1: its weights wait in the host's memory; level 2
would destroy the base). Without a GPU it is a process of its own, and stays as it is.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from opsd_train import sections
from opsd_train.errors import UserError
from opsd_train.model import _PACKAGED, load_model
from opsd_train.parallel import whole
from opsd_train.rollout.request import Completion, Request, Sampling
from opsd_train.rollout.stop import stop_ids


class VllmEngine:
    """`scratch` is a folder of this process's own; `max_model_len` holds prompt and completion.

    Where there are several processes, all of them call `sync` together.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: sections.RolloutConfig,
        *,
        model_config: sections.ModelConfig,
        scratch: Path,
        max_model_len: int,
        seed: int,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise UserError(
                "rollout.engine=vllm hands the adapter over; full fine-tuning (lora: null) needs "
                "rollout.engine=transformers"
            )
        self._vllm = _import_vllm()
        self._model, self._max_model_len = model, max_model_len
        self._scratch = scratch.resolve()  # else vLLM might take it for a name on the hub
        core = model.get_base_model()
        self._stop_ids = stop_ids(tokenizer, core.generation_config, config)
        self._sleeps = model.device.type == "cuda"
        self._llm = self._start(
            model=_base_weights(model_config, tokenizer, self._scratch),
            generation_config="vllm",  # no settings but ours
            dtype=model_config.dtype,
            max_model_len=max_model_len,
            seed=seed,
            logprobs_mode="processed_logprobs",
            enable_lora=True,
            max_loras=1,
            max_lora_rank=_allowed_rank(self._vllm, model.active_peft_config.r),
            gpu_memory_utilization=config.vllm_memory,
            **_placement(model.device),
        )
        if self._sleeps:
            self._llm.sleep(level=1)
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
        # vLLM keeps what it loaded under an id; with max_loras=1 a new id drives the old one out.
        self._adapter = self._vllm.lora.request.LoRARequest(
            self._folder.name, number, str(self._folder)
        )
        self._llm.reset_prefix_cache()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order, all with the adapter of the last sync."""
        for request in requests:
            self._check_length(len(request.prompt), sampling.max_new_tokens)
        if not requests:
            return []
        if self._sleeps:
            torch.cuda.empty_cache()  # vLLM needs what this process only holds
            self._llm.wake_up()
        outputs = self._llm.generate(
            [self._vllm.TokensPrompt(prompt_token_ids=request.prompt) for request in requests],
            [self._sampling_params(request, sampling) for request in requests],
            lora_request=self._adapter,
            use_tqdm=False,
        )
        if self._sleeps:
            self._llm.sleep(level=1)
        return [_completion(output.outputs[0]) for output in outputs]

    def close(self) -> None:
        """End vLLM and free what it holds."""
        self._llm.llm_engine.engine_core.shutdown(timeout=10)
        del self._llm

    def _start(self, **options: Any) -> Any:
        try:
            return self._vllm.LLM(**options)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"vLLM did not start: {' '.join(str(error).split())} (its own lines above say "
                "more); where memory was short or too much of it was asked for, change "
                "rollout.vllm_memory"
            ) from error

    def _sampling_params(self, request: Request, sampling: Sampling) -> Any:
        greedy = sampling.temperature == 0
        return self._vllm.SamplingParams(
            seed=request.seed,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=-1 if greedy or sampling.top_k == 0 else sampling.top_k,
            stop_token_ids=self._stop_ids,
            logprobs=0,  # of the sampled token only
            detokenize=False,
        )

    def _check_length(self, prompt: int, completion: int) -> None:
        if prompt + completion > self._max_model_len:
            raise UserError(
                f"a prompt of {prompt} tokens and a completion of up to {completion} do not fit "
                f"into vLLM's {self._max_model_len}; raise prompts.max_prompt_tokens"
            )


def _write_adapter(model: PeftModel, folder: Path) -> None:
    """As peft writes it, from whole tensors where the model's are sharded."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {name: whole(tensor) for name, tensor in trained.items()}
    # Without embeddings: peft would ask the hub whether they were resized.
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
        import vllm.config.lora
        import vllm.lora.request
    except ImportError as error:
        raise UserError(
            f"rollout.engine=vllm needs vLLM ({error}); on a GPU: pip install vllm, on a CPU: "
            "make vllm, which installs it beside the trainer in .venv-vllm"
        ) from None
    return vllm


def _base_weights(model_config: sections.ModelConfig, tokenizer: Any, scratch: Path) -> str:
    """A folder or hub name that vLLM reads; the packaged GGUF file is written out for it."""
    if model_config.name_or_path != _PACKAGED:
        return model_config.name_or_path
    folder = scratch / "base"
    model = load_model(model_config, tokenizer, getattr(torch, model_config.dtype))
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)  # the weights are already plain
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _allowed_rank(vllm: Any, rank: int) -> int:
    """The smallest of the ranks vLLM reserves memory for that holds this one."""
    allowed = get_args(vllm.config.lora.MaxLoRARanks)
    if rank > max(allowed):
        raise UserError(f"lora.rank={rank}: vLLM takes up to {max(allowed)}")
    return min(size for size in allowed if size >= rank)


def _placement(device: torch.device) -> dict[str, Any]:
    """Where vLLM runs: on this process's own GPU, or on the CPU."""
    if device.type != "cuda":
        return {"enforce_eager": True}
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Inside this process, on LOCAL_RANK's GPU: torchrun has set what vLLM reads for that.
        return {"enable_sleep_mode": True, "distributed_executor_backend": "external_launcher"}
    if device.index:
        raise UserError(
            f"rollout.engine=vllm runs on the first visible GPU and model.device is {device}; "
            f"set CUDA_VISIBLE_DEVICES={device.index} and model.device=cuda"
        )
    return {"enable_sleep_mode": True}


def _completion(output: Any) -> Completion:
    chosen = zip(output.token_ids, output.logprobs, strict=True)
    return Completion(
        tokens=list(output.token_ids),
        logprobs=[candidates[token].logprob for token, candidates in chosen],
        finished=output.finish_reason == "stop",
    )
