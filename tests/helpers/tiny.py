"""A model, a tokenizer and a recipe small enough to train in a test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opsd_train.config.load import config_from
from opsd_train.config.schema import Config
from tests.helpers import devices

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token a byte, the chat marks one token each, <s> before plain text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: index for index, character in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<s>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens(marks)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    wrapped.chat_template = chat_template
    return wrapped


def make_model(
    vocab_size: int = 261,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 32,
    tied: bool = True,
) -> LlamaForCausalLM:
    """Two layers of Llama with random weights and a decisive head, tied to the embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype)


def save_model(folder: Path) -> Path:
    """The tiny model and tokenizer as a folder that from_pretrained reads."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|end|>"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(model: Path | str, output_dir: Path | str) -> dict:
    """A recipe of a few seconds on that model."""
    return {
        "output_dir": str(output_dir),
        "steps": 3,
        "problems_per_step": 4,
        "micro_batch_tokens": 200,
        "model": {"name_or_path": str(model), "dtype": "float32", "device": devices.NAME},
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "data": {
            "source": "reasoning_gym",
            "task": "chain_sum",
            "task_config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "train_size": 20,
            "heldout_size": 6,
        },
        "prompts": {
            "student": "{{ problem.question }}",
            "teacher": "{{ problem.question }} It is {{ problem.solution }}.",
            "max_prompt_tokens": 120,
        },
        "rollout": {"max_new_tokens": 5, "batch_tokens": 400},
        "optim": {"lr": 1e-2},
        "evaluation": {"problems": 6, "max_new_tokens": 5},
        "report": {"sample_every": 2, "samples": 2},
    }


def config(model: Path | str, output_dir: Path | str, *overrides: str) -> Config:
    return config_from(recipe(model, output_dir), overrides)
