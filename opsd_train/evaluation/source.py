"""MODEL_OR_RUN, the model that is evaluated: a base model, or the newest weights of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from opsd_train.checkpoint.export import load_weights
from opsd_train.checkpoint.resume import Checkpoints
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import Config, LoraConfig, ModelConfig
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.settings import EvalConfig
from opsd_train.model.policy import Policy, load_generation_config, load_model
from opsd_train.rollout import Engine
from opsd_train.rollout.stop import stop_ids
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.rollout.vllm_model import VllmModel, base_weights, import_vllm


@dataclass(frozen=True)
class Source:
    """A base model and, if a run is evaluated, what it trained."""

    model: ModelConfig
    run: Config | None = None
    """The run's recipe."""
    folder: Path | None = None
    """The run's folder."""
    weights: Path | None = None
    """The run's checkpoint, or its adapter or model folder."""

    @property
    def weights_name(self) -> str | None:
        """The path of the weights within the run's folder."""
        if self.weights is None or self.folder is None:
            return None
        return self.weights.relative_to(self.folder).as_posix()

    @property
    def adapter(self) -> Path | None:
        """The folder of the run's adapter, in PEFT's format; None without one."""
        if self.weights is None or self.lora is None:
            return None
        within = self.weights / "adapter"
        return within if within.is_dir() else self.weights

    @property
    def lora(self) -> LoraConfig | None:
        """The settings of the run's adapter; None without one."""
        return self.run.lora if self.run is not None else None

    @property
    def is_model_folder(self) -> bool:
        """Whether the weights are a whole model, as a finished run writes it."""
        return self.weights is not None and (self.weights / "config.json").is_file()


def find_source(text: str, model: ModelConfig) -> Source:
    """What MODEL_OR_RUN means: a run's folder, one of its checkpoints, or a model's name or folder.

    `model` has the settings of the model; its name is replaced. Raises UserError for a run that
    has no weights yet.
    """
    folder = Path(text)
    if (folder / "complete.json").is_file():
        return _of_run(folder.parents[1], model, folder)
    if (folder / "config.yaml").is_file():
        return _of_run(folder, model, _weights(folder))
    return Source(replace(model, name_or_path=text))


def load_source(
    source: Source, tokenizer: Any, device: torch.device
) -> PreTrainedModel | PeftModel:
    """The frozen model in evaluation mode, on `device`; an adapter is not merged."""
    dtype, model_config = getattr(torch, source.model.dtype), source.model
    if source.is_model_folder:
        model_config = replace(model_config, name_or_path=str(source.weights))
    model: PreTrainedModel | PeftModel = load_model(model_config, tokenizer, dtype)
    if source.adapter is not None:
        model = PeftModel.from_pretrained(model, str(source.adapter))
    elif source.weights is not None and not source.is_model_folder:
        load_weights(model, source.weights)
    cast(nn.Module, model).to(device)  # in place; transformers' own `to` is annotated without self
    return model.eval().requires_grad_(False)


def _of_run(folder: Path, model: ModelConfig, weights: Path) -> Source:
    run: Config = config_from(load_recipe(str(folder / "config.yaml")))
    return Source(replace(model, name_or_path=run.model.name_or_path), run, folder, weights)


def _weights(folder: Path) -> Path:
    """The run's checkpoint; if there is none, the final adapter or model."""
    checkpoint = Checkpoints(folder, 1, DistributedContext(torch.device("cpu"))).of_the_run()
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
    """The engine that sampling.engine names, with the source's weights; closed at the end."""
    if config.sampling.engine == "transformers":
        policy = Policy(
            load_source(source, tokenizer, context.device),
            tokenizer.pad_token_id,
            getattr(torch, source.model.dtype),
        )
        engine = TransformersEngine(policy, tokenizer, config.sampling)
        engine.prove(source.model.name_or_path)
        yield engine
        return
    import_vllm()  # before weights are written out for it
    vllm = _vllm(config, source, tokenizer, context, scratch.resolve(), longest)
    try:
        yield vllm
    finally:
        vllm.close()


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
        stop_ids=stop_ids(tokenizer, generation_config, sampling),
        max_model_len=longest,
        memory=sampling.vllm_memory,
        seed=config.seed,
        adapter_rank=source.lora.rank if adapter and source.lora else None,
        logprobs=False,
    )
    if adapter:
        engine.adapt(adapter.resolve(), 1)
    return engine


def _weights_for_vllm(source: Source, tokenizer: Any, scratch: Path) -> str:
    """Folder or hub name of the base model where there is an adapter, else of all weights."""
    if source.weights is None or source.adapter is not None:
        return base_weights(source.model, tokenizer, scratch)
    if source.is_model_folder:
        return str(source.weights.resolve())
    folder = scratch / "weights"
    load_source(source, tokenizer, torch.device("cpu")).save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return str(folder)
