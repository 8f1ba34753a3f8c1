"""transformers' Trainer: distillation from a frozen teacher, without the logits of either.

The loss replaces the model's forward for one call, which DistributedDataParallel needs. Its mean is
over all labels of an optimizer step, on all ranks. Options: all of TrainingArguments.

CPU:     python examples/transformers_trainer.py
8 GPUs:  torchrun --nproc-per-node 8 examples/transformers_trainer.py --bf16 true \
             --models Qwen/Qwen3-0.6B Qwen/Qwen3-1.7B       (1 GPU: --nproc-per-node 1)
"""

from functools import partial
from unittest.mock import patch

import torch
import transformers as hf
from torch import Tensor, nn

from opsd_kernels import fused_linear_jsd

TINY = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class DistillationTrainer(hf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        core = self.accelerator.unwrap_model(model)
        forward = partial(self.divergence, core, num_tokens=num_items_in_batch)
        with patch.object(core, "forward", forward), self.accelerator.autocast():
            loss = model(**inputs)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradients of ranks are averaged
        return (loss, {"loss": loss}) if return_outputs else loss

    def divergence(self, student: nn.Module, labels: Tensor, num_tokens, **inputs) -> Tensor:
        with torch.no_grad():
            h_t = self.teacher.model(**inputs).last_hidden_state[:, :-1]
        h_s = student.model(**inputs).last_hidden_state[:, :-1]
        w_s, w_t = student.lm_head.weight, self.teacher.lm_head.weight
        return fused_linear_jsd(h_s, w_s, h_t, w_t, labels[:, 1:], num_tokens=num_tokens)


def main() -> None:
    parser = hf.HfArgumentParser(hf.TrainingArguments)
    parser.add_argument("--models", nargs=2, help="student and teacher; default: tiny random ones")
    parser.set_defaults(max_steps=3, logging_steps=1, report_to="none", save_strategy="no")
    args, names = parser.parse_args_into_dataclasses()
    torch.manual_seed(0)
    load = partial(hf.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    tiny = [hf.LlamaConfig(**TINY, initializer_range=0.2)] * 2
    student, teacher = map(load, names.models) if names.models else map(hf.LlamaForCausalLM, tiny)
    ids = torch.randint(256, (16, 24))
    labels = torch.where(torch.arange(24) < torch.randint(4, 20, (16, 1)), -100, ids)
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    trainer = DistillationTrainer(student, args, train_dataset=data)
    trainer.teacher = teacher.to(args.device).eval()
    trainer.train()


if __name__ == "__main__":
    main()
