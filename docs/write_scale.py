"""Writes the tables of docs/scale.md: what --dry-run --ranks --device predicts for large models.

The models are made of their published configurations and have no weights; a token is a byte.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from opsd_train.config.load import config_from, load_recipe
from opsd_train.dry_run.devices import DEVICES
from opsd_train.dry_run.prediction import Prediction, peak, predict_run

PAGE = Path(__file__).with_name("scale.md")
BEGIN, END = "<!-- predicted: {} -->\n", "<!-- /predicted: {} -->"
RANKS = (8, 64, 512)
SWEEP = (8, 16, 32, 64, 128, 256, 512)
QUESTION, SOLUTION = 256, 768  # tokens

# config.json of Qwen/Qwen3-8B, Qwen/Qwen3-32B and meta-llama/Llama-3.1-70B.
_QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, Any] = {
    "8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        **_QWEN,
    ),
    "32B": Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        **_QWEN,
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    ),
}  # fmt: skip


def tables(folder: Path) -> dict[str, str]:
    """The tables by name; `folder` is where models and data are made."""
    found = {
        (model, lora, device, ranks): _predict(folder, model, lora, device, ranks)
        for model in MODELS
        for lora, device, counts in (
            (True, "h100", SWEEP),
            (True, "a100", RANKS),
            (False, "h100", RANKS),
        )
        for ranks in counts
    }
    return {
        "h100": _table(found, True, "h100"),
        "a100": _table(found, True, "a100"),
        "full": _table(found, False, "h100"),
        "sweep": _sweep(found),
    }


def page(folder: Path) -> str:
    """The page with its tables written anew."""
    found = tables(folder)
    text = PAGE.read_text(encoding="utf-8")
    for name, table in found.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        text = before + begin + "\n" + table + "\n" + end + rest.split(end)[1]
    return text


def _predict(folder: Path, model: str, lora: bool, device: str, ranks: int) -> Prediction:
    name = _model(folder, model)
    recipe = load_recipe("paper/opsd-qwen3-1.7b")
    recipe["lora"] = recipe["lora"] if lora else None
    recipe["output_dir"] = str(folder / "never-made")
    recipe["problems_per_step"] = 512
    recipe["model"] |= {"name_or_path": str(name), "device": "cpu", "attention": "sdpa"}
    recipe["data"] = {
        "source": "file",
        "path": str(_problems(folder)),
        "columns": {"question": "question", "answer": "answer", "solution": "solution"},
        "train_size": None,
        "heldout_size": 64,
    }
    recipe["prompts"] |= {
        "student": "{{ problem.question }}",
        "teacher": "{{ problem.question }}{{ problem.solution }}",
        "teacher_chat_template": False,
        "teacher_thinking": None,
    }
    recipe["rollout"] |= {"engine": "vllm-server", "servers": ["http://rollouts:8000"]}
    return predict_run(config_from(recipe, []), "full", ranks, DEVICES[device])


def _model(folder: Path, name: str) -> Path:
    """A folder with the model's configuration and a tokenizer of bytes."""
    path = folder / name
    if not path.exists():
        config = MODELS[name]
        config.dtype, config.max_position_embeddings = "bfloat16", 40960
        config.save_pretrained(path)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: index for index, character in enumerate([*alphabet, "<|end|>"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
        made.save_pretrained(path)
    return path


def _problems(folder: Path) -> Path:
    """Problems whose prompts have the same length: 512 for a step, and the held-out ones."""
    path = folder / "problems.jsonl"
    if not path.exists():
        rows = (
            {"question": f"{i:0{QUESTION}d}", "answer": "1", "solution": "x" * SOLUTION}
            for i in range(576)
        )
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def row(folder: Path, model: str, device: str, ranks: int) -> str:
    """A row of the table of `device` with LoRA."""
    return _row(model, device, ranks, _predict(folder, model, True, device, ranks))


def _table(found: dict[Any, Prediction], lora: bool, device: str) -> str:
    lines = [
        "| predicted | GPUs | fits | peak of a rank | micro-batches | step | tokens/s | "
        "tokens/s of a GPU | waits for communication |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for ranks in RANKS:
            lines.append(_row(model, device, ranks, found[model, lora, device, ranks]))
    return "\n".join(lines) + "\n"


def _row(model: str, device: str, ranks: int, x: Prediction) -> str:
    most, seconds = peak(x.most), x.step_seconds
    waiting = sum(phase.communication for phase in x.seconds.values()) / seconds
    rate = x.step.loss_tokens / seconds
    fits = "yes" if most <= DEVICES[device].memory else "**no**"
    return (
        f"| {model} | {ranks} | {fits} | {most / 2**30:.1f} GiB | {len(x.step.micro_batches)} | "
        f"{seconds:.2f} s | {rate:,.0f} | {rate / ranks:,.0f} | {waiting:.0%} |"
    )


def _sweep(found: dict[Any, Prediction]) -> str:
    heads = " | ".join(f"{ranks} GPUs" for ranks in SWEEP)
    lines = [f"| predicted | {heads} |", "|---" + "|---:" * len(SWEEP) + "|"]
    for model in MODELS:
        rates = [1 / (ranks * found[model, True, "h100", ranks].step_seconds) for ranks in SWEEP]
        shares = " | ".join(f"{rate / rates[0]:.0%}" for rate in rates)
        lines.append(f"| {model} | {shares} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        PAGE.write_text(page(Path(scratch)), encoding="utf-8")
    print(PAGE)
