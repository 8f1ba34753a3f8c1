"""A plain PyTorch training loop: a causal LM teaches itself, without logits.

The student reads a question; the teacher, the same model without gradient, reads its solution too.
The loss is the JSD of their next-token distributions over the completion. To train on-policy,
sample it with model.generate. Pass softcap or logit scale to the loss if the model has them.

CPU:    python examples/training_loop.py
1 GPU:  python examples/training_loop.py --model Qwen/Qwen3-0.6B --device cuda --lr 1e-6
"""

import argparse

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opsd_kernels import fused_linear_jsd

ROWS = [(f"{a} + {b} =", f" {a + b}. {a} + {b} =", f" {a + b}.") for a, b in [(7, 5), (48, 77)]]
TINY = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def hidden_states(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """(tokens, D): where the completion is predicted, one position before each of its tokens."""
    ids = torch.tensor([prompt + completion], device=model.device)
    return model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]


def self_distillation(model: nn.Module, rows: list[list[list[int]]]) -> Tensor:
    with torch.no_grad():
        teacher = torch.cat([hidden_states(model, q + solution, c) for q, solution, c in rows])
    student = torch.cat([hidden_states(model, q, c) for q, _, c in rows])
    return fused_linear_jsd(student, model.lm_head.weight, teacher, model.lm_head.weight)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"model": "", "device": "cpu", "lr": 1e-3, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, encode = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.2)), str.encode
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        encode = AutoTokenizer.from_pretrained(args.model).encode
    optimizer = torch.optim.AdamW(model.to(args.device).parameters(), lr=args.lr)
    rows = [[list(encode(text)) for text in row] for row in ROWS]  # str.encode: a token a byte
    for step in range(args.steps):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = self_distillation(model, rows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss:.7f}, gradient norm {norm:.7f}")


if __name__ == "__main__":
    main()
