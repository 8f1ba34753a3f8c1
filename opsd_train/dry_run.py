"""What a run would do, from shapes alone: the resolved config, the loss's plan, the memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opsd_kernels import plan
from opsd_train.config import Config, to_yaml
from opsd_train.data import load_problems
from opsd_train.errors import UserError
from opsd_train.model import (
    add_adapters,
    lm_head,
    load_model_config,
    load_tokenizer,
)
from opsd_train.prompts import PromptBuilder
from opsd_train.world import resolve_device

_MIB = 2**20


def dry_run(config: Config) -> str:
    """Check the recipe, its data and prompts; describe the loss's plan and the memory expected.

    No weights are loaded and nothing is written.
    """
    device = resolve_device(config.model.device)
    train, heldout = load_problems(config.data)
    builder = PromptBuilder(load_tokenizer(config.model), config.prompts)
    problems = builder.filter([*train, *heldout])
    longest = max(max(len(builder.student(p)), len(builder.teacher(p))) for p in problems)
    sample = longest + config.rollout.max_new_tokens
    rows = min(config.problems_per_step, config.micro_batch_tokens // sample)
    if rows < 1:
        raise UserError(
            f"micro_batch_tokens={config.micro_batch_tokens} is less than the longest sample "
            f"({longest} prompt tokens and {config.rollout.max_new_tokens} new ones); raise it"
        )
    sizes = load_model_config(config.model).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes, dtype=getattr(torch, config.model.dtype))
        base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        adapted = add_adapters(model, config.lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    vocab_size, hidden_size = lm_head(adapted).weight.shape
    loss_plan = plan(
        rows * config.rollout.max_new_tokens,
        hidden_size,
        vocab_size,
        loss="divergence" if config.loss.objective == "full_vocabulary" else "logprob",
        dtype=getattr(torch, config.model.dtype),
        device=device,
    )
    memory = {
        "weights": base_bytes,
        "adapter, gradient and AdamW": trained * 16,
        "activations of a micro-batch, about": _activations(config, sizes, rows * sample),
        "loss workspace": loss_plan.workspace_bytes,
    }
    memory["sum, beside Python and the libraries"] = sum(memory.values())
    lines = [f"  {name:40}{size / _MIB:10,.0f} MiB" for name, size in memory.items()]
    return "\n".join(
        [
            to_yaml(config).rstrip(),
            "",
            f"{len(problems)} problems; longest prompt {longest} tokens; micro-batches of up to "
            f"{rows} samples; {trained:,} trained parameters",
            f"loss plan: {loss_plan}",
            f"memory expected on {device}:",
            *lines,
        ]
    )


def _activations(config: Config, sizes: Any, tokens: int) -> int:
    """Bytes kept for backward: what each layer's products, norms and fp32 adapter inputs save."""
    item = getattr(torch, config.model.dtype).itemsize
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    layer = item * (10 * hidden + 4 * inner) + 4 * (6 * hidden + inner)
    layers = sizes.num_hidden_layers
    if config.model.gradient_checkpointing:
        return tokens * (layers * item * hidden + layer)
    return tokens * layers * layer
