"""TRL's closest trainer as a contender, in its own training loop."""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from benchmarks.train_step.meters import Phases, forward_phase
from benchmarks.train_step.steps import Step, StepHooks, trainable_dtypes
from benchmarks.train_step.workload import Workload
from opsd_train.config.schema import Config
from opsd_train.distributed.context import resolve_device
from opsd_train.model.policy import load_model


class TrlSdft:
    """SDFTTrainer with our base model, adapter shape and prompts."""

    def __init__(self, work: Workload, phases: Phases, mode: str, mixed: bool) -> None:
        self.device = resolve_device(work.config.model.device)
        self.step = Step()
        self.trainer = _Timed(
            model=unmarked(_base_model(work).to(self.device)),
            args=_arguments(work, self.device, mode, mixed),
            train_dataset=_rows(work),
            processing_class=work.tokenizer,
            peft_config=_adapter(work.config),
        )
        self.trainer.step_taken = self.step
        _check_prompts(self.trainer, work)
        phases.wrap(self.trainer, "_generate", "rollout")
        phases.wrap(self.trainer, "_forward_logits", forward_phase)
        phases.wrap(self.trainer, "_compute_self_distillation_loss", "loss")

    def facts(self) -> dict[str, Any]:
        """Adapters' dtypes, mixed precision and optimizer."""
        return {
            "adapters": trainable_dtypes(self.trainer.model),
            "mixed_precision": self.trainer.accelerator.mixed_precision,
            "optimizer": str(self.trainer.args.optim.value),
        }

    def run(self, hooks: StepHooks) -> None:
        """Take all steps, the warm-up included."""
        self.trainer.add_callback(_Around(self.step, hooks))
        self.trainer.train()


class _Timed(SDFTTrainer):
    """SDFTTrainer that also records each step's loss and loss tokens."""

    step_taken: Step

    def compute_loss(self, model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, **options)
        self.step_taken.loss += loss.item()
        self.step_taken.loss_tokens += int(inputs["completion_mask"].sum())
        return loss


class _Around(TrainerCallback):
    def __init__(self, step: Step, hooks: StepHooks) -> None:
        self.step, self.hooks = step, hooks

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step.loss, self.step.loss_tokens = 0.0, 0
        self.hooks.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.hooks.end(self.step)


def _base_model(work: Workload) -> PreTrainedModel:
    config = work.config.model
    return load_model(config, work.tokenizer, getattr(torch, config.dtype))


def unmarked(model: PreTrainedModel) -> PreTrainedModel:
    """A copy not marked as quantized: transformers' Trainer refuses a model from a GGUF file."""
    if not getattr(model, "is_quantized", False):
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)
    plain.load_state_dict(model.state_dict())
    return plain


def _arguments(work: Workload, device: torch.device, mode: str, mixed: bool) -> SDFTConfig:
    """Our settings where both have them, TRL's defaults for the others."""
    config, length = work.config, work.config.rollout.max_new_tokens
    return SDFTConfig(
        output_dir=config.output_dir,
        distillation_mode=mode,
        distillation_alpha=config.loss.beta,  # in both the weight of KL(teacher || mixture)
        teacher_model_kind="base",
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=len(work.samples) // work.micro_batch,
        num_generations=1,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_steps=config.steps,
        shuffle_dataset=False,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.grad_clip,
        gradient_checkpointing=config.model.gradient_checkpointing,
        bf16=mixed and config.model.dtype == "bfloat16",
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def _adapter(config: Config) -> LoraConfig:
    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        task_type="CAUSAL_LM",
    )


def _rows(work: Workload) -> Dataset:
    """The step's problems, repeated for every step, in the order of our micro-batches."""
    rows = [
        {"prompt": [{"role": "user", "content": asked}], "privileged_context": shown}
        for asked, shown in work.messages()
    ]
    return Dataset.from_list(rows * work.config.steps)


def _check_prompts(trainer: SDFTTrainer, work: Workload) -> None:
    """Raise RuntimeError unless TRL's prompts have our token ids."""
    rows = trainer.train_dataset[: len(work.samples)]
    student, context = rows["prompt"], rows["privileged_context"]
    teacher = trainer.teacher_context_builder.select_generation_prompts(student, context)
    for side, prompts in (("student", student), ("teacher", teacher)):
        ours = [getattr(sample, f"{side}_prompt") for sample in work.samples]
        if trainer._tokenize_prompts(prompts) != ours:
            raise RuntimeError(f"TRL's {side} prompts are not the token ids of ours")
