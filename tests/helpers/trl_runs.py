"""Short runs of TRL's trainers on tiny random models, and what they computed."""

import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from tests.helpers import devices
from tests.helpers.tiny import make_tokenizer

TRAINERS: dict[str, tuple[type, type]] = {
    "sft": (SFTTrainer, SFTConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "distillation": (DistillationTrainer, DistillationConfig),
    "gkd": (GKDTrainer, GKDConfig),
    "sdft": (SDFTTrainer, SDFTConfig),
    "sdpo": (SDPOTrainer, SDPOConfig),
}
PREFERENCES: dict[str, tuple[type, type]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
}
MODELS = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "granite": {"logits_scaling": 0.6},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "sliding_window": 8},
}
WORDS = ["red fox", "two plus two", "a", "the longest of these prompts", "why", "blue"]
# Times differ between any two runs.
TIMES = ("time", "runtime", "per_second", "profiling")
# What each trainer generates with.
SAMPLED = {"max_completion_length": 7}
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 40},
    "grpo": {"num_generations": 2, **SAMPLED},
    "rloo": {"num_generations": 2, **SAMPLED},
    "distillation": SAMPLED,
    "gkd": {"max_new_tokens": 7, "max_length": 64, "lmbda": 0.5, "temperature": 1.0},
    "sdft": {
        "distillation_mode": "full_logits", "distillation_alpha": 0.5, "num_generations": 2,
        **SAMPLED,
    },
    "sdpo": {
        "distillation_mode": "full_logits", "distillation_alpha": 0.5, "num_generations": 2,
        **SAMPLED,
    },
}  # fmt: skip


@dataclass
class Record(TrainerCallback):
    """What a run computed: gradients of each optimizer step, the log, and the evaluation."""

    grads: list[dict[str, Tensor]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(state.log_history[-1]))


def make_causal_lm(family: str, seed: int = 0) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=260,
        pad_token_id=260,
        **MODELS[family],
    )
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config)


def tiny_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|end|>"
    return tokenizer


def save(family: str, folder: Path) -> Path:
    """Model and tokenizer in a folder: some trainers load them again, as their reference."""
    make_causal_lm(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def saved(family: str) -> tempfile.TemporaryDirectory:
    """The folder of `save`, once a process."""
    folder = tempfile.TemporaryDirectory()
    save(family, Path(folder.name))
    return folder


def letters(completions: list, **_: Any) -> list[float]:
    """A reward that differs between completions."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ord(character) % 7 for character in text) / 10 for text in texts]


def examples(kind: str) -> Dataset:
    if kind == "gkd":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": w},
                    {"role": "assistant", "content": w[::-1]},
                ]
            }
            for w in WORDS
        ]
    elif kind == "gold":
        rows = [
            {
                "prompt": [{"role": "user", "content": w}],
                "completion": [{"role": "assistant", "content": w[::-1]}],
            }
            for w in WORDS
        ]
    elif kind == "sft":
        rows = [{"prompt": word, "completion": word[::-1] + "!"} for word in WORDS]
    elif kind == "dpo":
        rows = [{"prompt": w, "chosen": w[::-1], "rejected": w.upper() + "?"} for w in WORDS]
    elif kind == "kto":
        rows = [
            {"prompt": w, "completion": w[::-1], "label": number % 2 == 0}
            for number, w in enumerate(WORDS)
        ]
    elif kind in ("sdft", "sdpo"):
        rows = [
            {"prompt": [{"role": "user", "content": w}], "privileged_context": w[::-1]}
            for w in WORDS
        ]
    else:
        rows = [{"prompt": word} for word in WORDS]
    return Dataset.from_list(rows * 3)


def build(
    kind: str,
    family: str,
    folder: Path,
    trainer_class: Callable[..., Any] | None = None,
    lora: bool = False,
    source: Path | None = None,
    **options: Any,
) -> tuple[Any, Record]:
    """A trainer and its record; `options` are those of the trainer's config.

    `source`: a folder that `save` filled; by default that of `saved`.
    """
    own_class, config_class = (TRAINERS | PREFERENCES)[kind]
    settings = {
        "output_dir": str(folder), "max_steps": 2, "logging_steps": 1, "report_to": "none",
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-4,
        "save_strategy": "no", "use_cpu": devices.ON_CPU, "bf16": False, "seed": 1,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
        "gradient_checkpointing": False, "max_grad_norm": 1e9,
    }  # fmt: skip
    args = config_class(**{**settings, **OPTIONS.get(kind, {}), **options})
    record = Record()
    more: dict[str, Any] = {}
    if kind in ("grpo", "rloo", "sdpo"):
        more["reward_funcs"] = letters
    if kind in ("distillation", "gkd", "gold"):
        more["teacher_model"] = make_causal_lm(family, seed=5)
    if lora:
        more["peft_config"] = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
    source = source or Path(saved(family).name)
    random.seed(0)
    torch.manual_seed(0)
    trainer = (trainer_class or own_class)(
        model=transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        args=args,
        train_dataset=examples(kind),
        eval_dataset=examples(kind).select(range(4)),
        processing_class=tiny_tokenizer(),
        callbacks=[record],
        **more,
    )
    return trainer, record


def run(trainer: Any, record: Record, checkpoint: Path | None = None) -> Record:
    """Train, from a checkpoint or the start, then evaluate; from the same seeds each time."""
    random.seed(0)
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    random.seed(0)
    torch.manual_seed(0)
    trainer.evaluate()
    return record


def assert_same_run(ours: Record, theirs: Record) -> None:
    """Gradients within 5e-6 of their norm; the loss and every metric within 1e-5, relative."""
    assert len(ours.grads) == len(theirs.grads) > 0
    for found, wanted in zip(ours.grads, theirs.grads, strict=True):
        assert found.keys() == wanted.keys()
        norm = flat(wanted).norm()
        assert norm > 1e-3
        gap = (flat(found) - flat(wanted)).norm() / norm
        assert gap < 5e-6, f"gradients differ by {gap:.2g} of their norm"
    assert len(ours.logs) == len(theirs.logs)
    for found_log, wanted_log in zip(ours.logs, theirs.logs, strict=True):
        assert found_log.keys() == wanted_log.keys()
        for name, value in wanted_log.items():
            if value is not None and not any(word in name for word in TIMES):
                # A mean of advantages or of log-ratios is rounding around 0.
                assert found_log[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])
