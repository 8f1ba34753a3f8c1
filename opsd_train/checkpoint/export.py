"""Export a run's weights for other libraries: its adapter, or the whole model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from opsd_train.checkpoint.resume import Checkpoints
from opsd_train.checkpoint.weights import write_model
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import Config
from opsd_train.distributed.context import DistributedContext
from opsd_train.model.policy import load_model, load_tokenizer


def export(run_dir: Path, out: Path | None = None, *, merged: bool = False) -> Path:
    """Write a run's adapter, of its newest checkpoint, or of the best where collapse.action=best
    ended it, with the tokenizer; `merged`: the whole model instead.

    `out` defaults to export/adapter or export/merged in the run folder. Returns the folder written.
    Raises UserError if there is nothing to export, or `out` is not empty or cannot be written.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    out = out or run_dir / "export" / ("merged" if merged else "adapter")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; name another folder")
    checkpoint = Checkpoints(run_dir, 1, DistributedContext(torch.device("cpu"))).of_the_run()
    if checkpoint is None:
        raise UserError(f"{run_dir} has no checkpoint to export; is it the folder of a run?")
    config: Config = config_from(load_recipe(str(checkpoint / "recipe.yaml")))
    if config.lora is None and not merged:
        raise UserError(f"{run_dir} trained all weights, not an adapter; add --merged")
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(checkpoint, config, partial, merged)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write(checkpoint: Path, config: Config, folder: Path, merged: bool) -> None:
    tokenizer = load_tokenizer(config.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if merged:
        # In float32, so that the sum of base and adapter is rounded only once.
        base = load_model(
            replace(cast(Any, config.model), attention="eager"), tokenizer, torch.float32
        )
        model = _trained(base, checkpoint, config.lora is not None)
        dtype = getattr(torch, config.model.dtype)
        write_model(model, model.state_dict(keep_vars=True), dtype, folder)
    else:
        shutil.copytree(checkpoint / "adapter", folder)
    tokenizer.save_pretrained(str(folder))


def _trained(base: nn.Module, checkpoint: Path, has_adapter: bool) -> nn.Module:
    if has_adapter:
        return PeftModel.from_pretrained(base, str(checkpoint / "adapter")).merge_and_unload()
    return load_weights(base, checkpoint)


def load_weights(base: nn.Module, checkpoint: Path) -> nn.Module:
    """Load a checkpoint with all weights trained (no adapter) into `base`, and return it."""
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    reader = dcp.FileSystemReader(checkpoint / "tensors")
    dcp.load({"model": weights}, storage_reader=reader, no_dist=True)
    return base
