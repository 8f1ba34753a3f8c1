"""TRL's SDFTTrainer without logits: a model learns from itself, shown the solution.

Only `fused(...)` and distillation_mode="full_logits" differ from TRL's own way; its default, top-k,
approximates that. Options: all of SDFTConfig.

CPU:     python examples/trl_sdft.py
1 GPU:   python examples/trl_sdft.py --model Qwen/Qwen3-1.7B --bf16 true --max_steps 200
8 GPUs:  torchrun --nproc-per-node 8 examples/trl_sdft.py --model Qwen/Qwen3-1.7B --bf16 true
"""

import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from opsd_kernels.integrations.trl import fused

TINY = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def load(name: str | None) -> tuple:
    """A model of the hub and its tokenizer; without a name tiny random ones that know bytes."""
    if name:
        model = hf.AutoModelForCausalLM.from_pretrained(name)
        return model, hf.AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    config = hf.LlamaConfig(**TINY, intermediate_size=48, initializer_range=0.2)
    return hf.LlamaForCausalLM(config), hf.ByT5Tokenizer(chat_template=CHAT)


def main() -> None:
    parser = hf.HfArgumentParser(SDFTConfig)
    parser.add_argument("--model", help="a causal LM of the hub; default: a tiny random one")
    parser.set_defaults(
        output_dir="runs/trl_sdft", distillation_mode="full_logits", distillation_alpha=0.5,
        max_steps=3, logging_steps=1, max_completion_length=16, num_generations=2,
        report_to="none", save_strategy="no", bf16=False,
    )  # fmt: skip
    args, name = parser.parse_args_into_dataclasses()
    model, tokenizer = load(name.model)
    sums = [(f"What is {a} + {b}?", f"{a} + {b} is {a + b}.") for a in range(8) for b in range(8)]
    rows = [
        {"prompt": [{"role": "user", "content": asked}], "privileged_context": solution}
        for asked, solution in sums
    ]
    trainer = fused(SDFTTrainer)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
