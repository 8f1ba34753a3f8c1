"""MODEL_OR_RUN: a model, or a run's folder with what it has trained so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from opsd_train.checkpoint.export import load_weights
from opsd_train.checkpoint.resume import Checkpoints
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import Config, ModelConfig
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.settings import EvalConfig
from opsd_train.model.policy import Policy, load_generation_config, load_model
from opsd_train.rollout import Engine
from opsd_train.rollout.stop import stop_ids
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.rollout.vllm_model import VllmModel, base_weights, import_vllm


@dataclass(frozen=True)
class Source:
    """The base model, and the run that trained it, if one did."""

    model: ModelConfig
    run: Config | None = None
    folder: Path | None = None
    """The run's."""
    weights: Path | None = None
    """The run's checkpoint, adapter or model folder."""

    @property
    def weights_name(self) -> str | None:
        """The weights' place within the run's folder."""
        return self.weights and self.weights.relative_to(self.folder).as_posix()

    @property
    def adapter(self) -> Path | None:
        """The folder of the run's adapter, in PEFT's format."""
        if self.weights is None or self.run.lora is None:
            return None
        within = self.weights / "adapter"
        return within if within.is_dir() else self.weights

    @property
    def is_model_folder(self) -> bool:
        """Whether the weights are a whole model, as the end of a run writes it."""
        return self.weights is not None and (self.weights / "config.json").is_file()


def find_source(text: str, model: ModelConfig) -> Source:
    """What MODEL_OR_RUN means; `model` says all but its name."""
    folder = Path(text)
    if (folder / "complete.json").is_file():
        return _of_run(folder.parents[1], model, folder)
    if (folder / "config.yaml").is_file():
        return _of_run(folder, model, _newest(folder))
    return Source(replace(model, name_or_path=text))


def load_source(source: Source, tokenizer: Any, device: torch.device) -> nn.Module:
    """The model, ready to generate; an adapter stays an adapter."""
    dtype, model_config = getattr(torch, source.model.dtype), source.model
    if source.is_model_folder:
        model_config = replace(model_config, name_or_path=str(source.weights))
    model = load_model(model_config, tokenizer, dtype)
    if source.adapter is not None:
        model = PeftModel.from_pretrained(model, str(source.adapter))
    elif source.weights is not None and not source.is_model_folder:
        load_weights(model, source.weights)
    return model.to(device).eval().requires_grad_(False)


def _of_run(folder: Path, model: ModelConfig, weights: Path) -> Source:
    run = config_from(load_recipe(str(folder / "config.yaml")))
    return Source(replace(model, name_or_path=run.model.name_or_path), run, folder, weights)


def _newest(folder: Path) -> Path:
    """The newest checkpoint; what the end of a run wrote where its checkpoints are gone."""
    checkpoint = Checkpoints(folder, 1, DistributedContext(torch.device("cpu"))).newest_whole()
    if checkpoint is not None:
        return checkpoint
    for name, file in (("adapter", "adapter_config.json"), ("model", "config.json")):
        if (folder / name / file).is_file():
            return folder / name
    raise UserError(f"{folder} has no weights yet: no checkpoints, adapter or model is in it")


@contextmanager
def open_engine(
    config: EvalConfig,
    source: Source,
    tokenizer: Any,
    context: DistributedContext,
    *,
    scratch: Path,  # a folder of this process's own
    longest: int,  # tokens of a prompt and its completion
) -> Iterator[Engine]:
    """sampling.engine with the model, closed at the end."""
    if config.sampling.engine == "transformers":
        policy = Policy(
            load_source(source, tokenizer, context.device),
            tokenizer.pad_token_id,
            getattr(torch, source.model.dtype),
        )
        engine = TransformersEngine(policy, tokenizer, config.sampling.for_engine())
        engine.prove(source.model.name_or_path)
        yield engine
        return
    import_vllm()  # before weights are written out for it
    engine = _vllm(config, source, tokenizer, context, scratch.resolve(), longest)
    try:
        yield engine
    finally:
        engine.close()


def _vllm(
    config: EvalConfig,
    source: Source,
    tokenizer: Any,
    context: DistributedContext,
    scratch: Path,
    longest: int,
) -> VllmModel:
    sampling, adapter = config.sampling, source.adapter
    generation_config = load_generation_config(source.model)
    engine = VllmModel(
        _weights_for_vllm(source, tokenizer, scratch),
        dtype=source.model.dtype,
        device=context.device,
        stop_ids=stop_ids(tokenizer, generation_config, sampling.for_engine()),
        max_model_len=longest,
        memory=sampling.vllm_memory,
        seed=config.seed,
        adapter_rank=source.run.lora.rank if adapter else None,
        logprobs=False,
    )
    if adapter:
        engine.adapt(adapter.resolve(), 1)
    return engine


def _weights_for_vllm(source: Source, tokenizer: Any, scratch: Path) -> str:
    """A folder or hub name: of the base model where there is an adapter, else of all weights."""
    if source.weights is None or source.adapter is not None:
        return base_weights(source.model, tokenizer, scratch)
    if source.is_model_folder:
        return str(source.weights.resolve())
    folder = scratch / "weights"
    load_source(source, tokenizer, torch.device("cpu")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
