"""One TRL trainer in its own process: a line on stdin starts a step, a JSON line answers.

python -m benchmarks.integrations.worker KIND plain|fused
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from benchmarks import resident
from benchmarks.train_step.trl_sdft import unmarked
from opsd_kernels.integrations.trl import fused
from opsd_train.config.load import config_from, load_recipe
from opsd_train.model.policy import load_model, load_tokenizer

SEQUENCES, TOKENS, STEPS = 8, 128, 5  # the first step warms up
_MIB = 2**20

_SAMPLED = {"max_completion_length": TOKENS}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "sdft": (
        SDFTTrainer,
        SDFTConfig,
        {"distillation_mode": "full_logits", "distillation_alpha": 0.5, **_SAMPLED},
    ),
    "gkd": (GKDTrainer, GKDConfig, {"lmbda": 0.0, "max_length": 2 * TOKENS}),
    "distillation": (DistillationTrainer, DistillationConfig, {"beta": 0.5, **_SAMPLED}),
    "sft": (SFTTrainer, SFTConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 4, **_SAMPLED}),
}


class _Steps(TrainerCallback):
    """Waits for a command before each step, and answers with its seconds, peak and loss."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to stderr
        self.loss = 0.0

    def say(self, **values: Any) -> None:
        self.answers.write(json.dumps(values) + "\n")
        self.answers.flush()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        gc.collect()
        resident.reset_peak()
        self.before, self.loss = resident.resident(), 0.0
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self.began
        peak = resident.peak()
        extra, peak = (peak - self.before) / _MIB, peak / _MIB
        self.say(seconds=seconds, peak_extra_mib=extra, peak_mib=peak, loss=self.loss)


def main() -> None:
    """Serve steps on stdin until they are taken."""
    kind, contender = sys.argv[1:]
    steps = _Steps()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(kind, contender == "fused", folder, steps)
        compute_loss = trainer.compute_loss

        def recorded(*args: Any, **options: Any) -> Any:
            loss = compute_loss(*args, **options)
            steps.loss = loss.item()
            return loss

        trainer.compute_loss = recorded
        steps.say(ready=type(trainer).__mro__[1 if contender == "fused" else 0].__name__)
        trainer.train()


def _trainer(kind: str, is_fused: bool, folder: str, steps: _Steps) -> Any:
    own_class, config_class, options = KINDS[kind]
    config = config_from(load_recipe("demo/opsd"), ["model.dtype=float32"]).model
    tokenizer = load_tokenizer(config)
    args = config_class(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=SEQUENCES, use_cpu=True,
        bf16=False, gradient_checkpointing=True, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, learning_rate=1e-5, seed=0, **options,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if kind == "grpo":
        more["reward_funcs"] = _letters
    if kind in ("gkd", "distillation"):
        more["teacher_model"] = _model(config, tokenizer)
    torch.manual_seed(0)
    model = _model(config, tokenizer)
    model.generate = _Random(len(tokenizer))
    return (fused(own_class) if is_fused else own_class)(
        model=model,
        args=args,
        train_dataset=_rows(kind, tokenizer),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[steps],
        **more,
    )


def _letters(completions: list, **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def _model(config: Any, tokenizer: Any) -> PreTrainedModel:
    return unmarked(load_model(config, tokenizer, torch.float32))


class _Random:
    """Stands for `model.generate`, which is alike in both: random completions of TOKENS tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        size = (len(input_ids), TOKENS)
        made = torch.randint(1000, self.vocab_size, size, generator=self.generator)
        return torch.cat([input_ids, made], dim=1)


def _rows(kind: str, tokenizer: Any) -> Dataset:
    """Prompts of a few words; where nothing is generated, with answers of about TOKENS tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, len(tokenizer), (SEQUENCES, TOKENS), generator=generator)
    rows = []
    for number, answer in enumerate(map(tokenizer.decode, ids)):
        user = {"role": "user", "content": f"What is {number} + {number * 7}?"}
        assistant = {"role": "assistant", "content": answer}
        if kind == "sft":
            rows.append({"prompt": [user], "completion": [assistant]})
        elif kind == "gkd":
            rows.append({"messages": [user, assistant]})
        else:
            rows.append({"prompt": [user], "privileged_context": f"It is {number * 8}."})
    return Dataset.from_list(rows * STEPS)


if __name__ == "__main__":
    main()
