"""LoRA adapters on a model, and the layers that cannot have one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from opsd_train.config import schema
from opsd_train.config.errors import UserError


def add_adapters(model: nn.Module, lora: schema.LoraConfig) -> PeftModel:
    """LoRA in fp32 on the frozen base; switched off, what is left is the initial policy.

    Raises UserError for targets that match nothing, that peft has no adapter for, or that hold
    the head's weight.
    """
    targets = lora.target_modules
    named = [] if isinstance(targets, str) else targets
    unknown = [target for target in named if not any(_matching(model, target))]
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
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
                    reason = f"{target!r} is {kind}, no linear layer; name the layers in it"
        # peft may know an unknown name: what the experts of a mixture were called when they were
        # linear layers.
        raise UserError(_unknown(unknown) or f"lora.target_modules: {reason}") from None
    kept = adapted.peft_config["default"].target_modules
    if reason := _unknown([target for target in unknown if target in kept]) or _refusal(adapted):
        raise UserError(reason)
    return adapted


def left_out(adapted: PeftModel, lora: schema.LoraConfig) -> list[str]:
    """A line for each group of weights that the targets seem to mean and that stay frozen."""
    core, tuner, lines = adapted.get_base_model(), adapted.base_model, []
    frozen = 0
    for name, parameter in core.named_parameters():
        plain = name.replace(".base_layer", "")
        stacked = parameter.ndim == 3 and "experts" in plain and "lora_" not in plain
        if stacked and plain not in tuner.targeted_parameter_names:
            frozen += parameter.numel()
    if frozen:
        lines.append(f"the experts are not linear layers: {frozen:,} weights of theirs stay frozen")
    named = [] if isinstance(lora.target_modules, str) else lora.target_modules
    for target in named:
        missed = [m for m in _matching(core, target) if isinstance(m, nn.Linear)]
        if missed:
            lines.append(
                f"peft puts {target} on the experts alone: {len(missed)} linear layers of that "
                "name stay frozen"
            )
    return [f"lora.target_modules: {line}" for line in lines]


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name: of a model with adapters, the adapter's weights."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write_adapter(adapted: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    """The adapter in PEFT's own format; `weights`: whole tensors, by the names of
    `trained_weights`."""
    # Without embeddings: peft would ask the hub whether they were resized.
    adapted.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)


def _matching(model: nn.Module, target: str) -> Iterator[nn.Module]:
    """The modules that peft takes a target for."""
    for name, module in model.named_modules():
        if name == target or name.endswith(f".{target}"):
            yield module


def _unknown(targets: list[str]) -> str | None:
    return f"lora.target_modules: the model has no module {targets[0]!r}" if targets else None


def _refusal(adapted: PeftModel) -> str | None:
    """Why the losses, or a merged export, would go wrong."""
    core = adapted.get_base_model()
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
