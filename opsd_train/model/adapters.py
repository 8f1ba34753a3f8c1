"""LoRA adapters: where they can be added, and which weights the targets leave frozen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_train.config import schema
from opsd_train.config.errors import UserError


def add_adapters(model: PreTrainedModel, lora: schema.LoraConfig) -> PeftModel:
    """Wrap `model` in fp32 LoRA adapters and freeze its own weights.

    With the adapters switched off the model is the initial policy. Raises UserError if a target
    matches no module, if peft has no adapter for it, or if it holds the head's weight.
    """
    targets = lora.target_modules
    named = [] if isinstance(targets, str) else targets
    unknown = [target for target in named if not any(_matching(model, target))]
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft annotates int, floats work
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings(action="ignore"):
            # fp32 adapters beside bf16 weights
            adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        for target in named:
            for module in _matching(model, target):
                if not hasattr(module, "weight"):
                    kind = type(module).__name__
                    reason = f"{target!r} is {kind}, not a linear layer; name the layers inside it"
        # peft may accept a name the model lacks: it maps the experts' former linear layers to the
        # stacked weights that replaced them.
        raise UserError(_unknown(unknown) or f"lora.target_modules: {reason}") from None
    kept = cast(LoraConfig, adapted.peft_config["default"]).target_modules or ()
    if problem := _unknown([target for target in unknown if target in kept]) or _refusal(adapted):
        raise UserError(problem)
    return adapted


def frozen_weight_warnings(adapted: PeftModel, lora: schema.LoraConfig) -> list[str]:
    """One line per group of weights that the targets seem to name but that stay frozen."""
    core, lines = adapted.get_base_model(), []
    tuner: Any = adapted.base_model
    frozen = 0
    for name, parameter in core.named_parameters():
        plain = name.replace(".base_layer", "")
        stacked = parameter.ndim == 3 and "experts" in plain and "lora_" not in plain
        if stacked and plain not in tuner.targeted_parameter_names:
            frozen += parameter.numel()
    if frozen:
        lines.append(f"the experts are not linear layers: their {frozen:,} weights stay frozen")
    named = [] if isinstance(lora.target_modules, str) else lora.target_modules
    for target in named:
        missed = [m for m in _matching(core, target) if isinstance(m, nn.Linear)]
        if missed:
            lines.append(
                f"peft applies {target} to the experts only: {len(missed)} linear layers of that "
                "name stay frozen"
            )
    return [f"lora.target_modules: {line}" for line in lines]


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; with adapters, those of the adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapters_are_off(model: nn.Module) -> bool:
    """Whether the adapters are switched off, as in Policy.without_adapters."""
    return any(m.disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer))


def write_adapter(adapted: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter to `folder` in PEFT's format.

    `adapted`: what `add_adapters` gave; `weights`: full tensors by the names of `trained_weights`.
    """
    assert isinstance(adapted, PeftModel)
    # Without embeddings, because peft would ask the hub whether they were resized.
    adapted.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)


def _matching(model: nn.Module, target: str) -> Iterator[nn.Module]:
    """The modules that peft matches with a target: by full name or by its last parts."""
    for name, module in model.named_modules():
        if name == target or name.endswith(f".{target}"):
            yield module


def _unknown(targets: list[str]) -> str | None:
    return f"lora.target_modules: the model has no module {targets[0]!r}" if targets else None


def _refusal(adapted: PeftModel) -> str | None:
    """Why the losses or a merged export would be wrong with these adapters, if they would."""
    core = cast(PreTrainedModel, adapted.get_base_model())
    head, embeddings = core.get_output_embeddings(), core.get_input_embeddings()
    names = {module: name.rpartition(".")[2] for name, module in core.named_modules()}
    if isinstance(head, BaseTunerLayer):
        return (
            f"lora.target_modules: {names[head]} cannot have an adapter, the loss reads its "
            "weight; take it off the list"
        )
    if isinstance(embeddings, BaseTunerLayer) and embeddings.weight is head.weight:
        return (
            f"lora.target_modules: {names[embeddings]} cannot have an adapter, its weight is also "
            "the head's; take it off the list"
        )
    return None
