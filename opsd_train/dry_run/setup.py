"""What a recipe trains, as the predictions need it: models without weights, dtypes, sharding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from opsd_train.config.method_schema import GrpoConfig, OpsdConfig, TeacherConfig
from opsd_train.config.schema import Config, LoraConfig, ModelConfig
from opsd_train.dry_run.memory import OtherTeacher, Setup, Sizes, sizes_of
from opsd_train.methods import METHODS
from opsd_train.methods.common import workspace_bytes
from opsd_train.model.adapters import add_adapters
from opsd_train.model.policy import PACKAGED, attention, load_model_config


def setup_of(config: Config, shard: str, ranks: int, device: torch.device) -> tuple[Setup, Sizes]:
    """Dtypes, sharding and teacher of the recipe's run, and the trained model's sizes."""
    dtype = getattr(torch, config.model.dtype)
    sizes = sizes_without_weights(config.model, config.lora)
    stored = load_model_config(config.model).dtype or torch.float32
    full = config.lora is None
    whole_file = ranks == 1 or config.model.name_or_path == PACKAGED
    setup = Setup(
        itemsize=dtype.itemsize,
        file_itemsize=stored.itemsize if whole_file else 0,
        checkpointing=config.model.gradient_checkpointing,
        loss={
            "loss": "divergence" if _heads(config) == 2 else "logprob",
            "dtype": dtype,
            "device": device,
            "two_passes": 0 < config.loss.beta < 1 or config.loss.token_clip is not None,
            "workspace_bytes": workspace_bytes(device, trained=full),
        },
        shards=ranks if shard == "full" else 1,
        processes=ranks,
    )
    teacher = _teacher_setup(config, sizes)
    return replace(setup, **teacher, top_k=_top_k(config, sizes), beside=_beside(config)), sizes


def core_of(model: ModelConfig) -> PreTrainedModel:
    """The causal LM without values of its weights."""
    text: Any = load_model_config(model).get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text, attn_implementation=attention(model))


def teachers_of(config: Config) -> dict[str | None, TeacherConfig]:
    """The recipe's teachers that are models of their own, by name."""
    return config.distill.by_name() if config.distill else {}


def teacher_model(config: Config, teacher: TeacherConfig) -> ModelConfig:
    """The teacher as a model."""
    # mypy does not see that the sections of a recipe are dataclasses.
    return replace(cast(Any, config.model), name_or_path=teacher.teacher, dtype=teacher.dtype)


def _top_k(config: Config, sizes: Sizes) -> int:
    """How many of the teacher's tokens are kept at each completion token; 0: its hidden states."""
    return min(config.loss.top_k, sizes.vocab) if config.loss.objective == "top_k" else 0


def _teacher_setup(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The fields of Setup about the models that `precompute` runs; `sizes` are the policy's."""
    full, keeps_states = config.lora is None, config.loss.objective != "top_k"
    if config.method == "opsd":
        return {"teacher": sizes, "keeps_states": keeps_states, **_own_teacher(config, full)}
    if config.distill is not None:
        others = [
            OtherTeacher(
                sizes_without_weights(teacher_model(config, teacher), None),
                getattr(torch, teacher.dtype).itemsize,
            )
            for teacher in teachers_of(config).values()
            if teacher.in_memory
        ]
        mixture = config.distill.sampler_share > 0
        return {"others": tuple(others), "keeps_states": keeps_states, "mixture": mixture}
    if config.method == "grpo":
        grpo = config.grpo or GrpoConfig()
        kl = grpo.kl_weight > 0
        return {
            "teacher": sizes if kl or config.updates_per_step > 1 else None,
            "copies": int(kl and full),
        }
    return {"copies": int(full)} if config.method == "context_distill" else {}


def _own_teacher(config: Config, full: bool) -> dict[str, Any]:
    """What the teacher of opsd, and a policy gradient beside it, add."""
    weights = (config.opsd or OpsdConfig()).teacher
    copied = weights in ("ema", "resync") or (weights == "initial" and full)
    kl = config.grpo is not None and config.grpo.kl_weight > 0
    old = config.updates_per_step > 1 and (config.grpo is not None or config.loss.at_samples)
    return {
        "copies": int(copied) + int(kl and full and weights != "initial"),
        "logprob_passes": int(kl) + int(old),
    }


def _heads(config: Config) -> int:
    """Heads whose logits the loss holds at the same time."""
    whole = _full_vocabulary(config) or config.loss.forward_kl is not None
    return 2 if METHODS[config.method].divergence and whole else 1


def _full_vocabulary(config: Config) -> bool:
    return config.loss.objective == "full_vocabulary" and config.loss.weight > 0


def _beside(config: Config) -> tuple[str, ...]:
    """Losses beside a divergence over the vocabulary, each with its own pass over the logits."""
    loss = config.loss
    found: list[str] = []
    if _heads(config) == 1:
        return ()
    if not _full_vocabulary(config) or config.grpo is not None or loss.long_term > 0:
        found.append("logprob")  # of the samples: the objective, or a policy gradient
    if _full_vocabulary(config) and loss.forward_kl is not None:
        found.append("divergence")
    return tuple(found)


def sizes_without_weights(model: ModelConfig, lora: LoraConfig | None) -> Sizes:
    """A model's sizes, with adapters if there are any."""
    core = core_of(model)
    with torch.device("meta"):
        adapted = core if lora is None else add_adapters(core, lora)
    rank, eager = lora.rank if lora else 0, core.config._attn_implementation == "eager"
    return sizes_of(adapted, core.config.get_text_config(), rank, eager)
