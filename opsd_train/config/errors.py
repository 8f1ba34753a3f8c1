"""UserError, and one-line messages for mistakes in a recipe."""

import difflib

import yaml
from pydantic import ValidationError

FOREIGN_KEYS = {
    "adam_weight_decay": "optim.weight_decay",
    "attn_implementation": "model.attention",
    "bf16": "model.dtype",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "eval_steps": "evaluation.every",
    "learning_rate": "optim.lr",
    "logging_steps": "report.sample_every",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_target_modules": "lora.target_modules",
    "lr_scheduler_type": "optim.schedule",
    "max_completion_length": "rollout.max_new_tokens",
    "max_grad_norm": "optim.grad_clip",
    "max_prompt_length": "prompts.max_prompt_tokens",
    "max_steps": "steps",
    "model_name_or_path": "model.name_or_path",
    "num_generations": "rollout.samples_per_prompt",
    "per_device_train_batch_size": "problems_per_step",
    "r": "lora.rank",
    "report_to": "report.trackers",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "torch_dtype": "model.dtype",
    "warmup_ratio": "optim.warmup_steps",
}
"""Names of keys in transformers, TRL and peft, and the keys to suggest for them."""

RENAMED = {"watch": "collapse"}
"""Keys of version 0.1 and their names since 0.2."""


class UserError(Exception):
    """Bad input; the message is one line, which the command line prints without a traceback."""


def suggest(word: str, known: list[str]) -> str:
    """The end of an error message that suggests the known name closest to `word`; may be empty."""
    tails = {name.rpartition(".")[2]: name for name in known}
    foreign = FOREIGN_KEYS.get(word.rpartition(".")[2])
    if foreign in known:
        near = [foreign]
    elif word in tails:  # the right key without its section
        near = [tails[word]]
    else:
        near = difflib.get_close_matches(word, known, n=1) or [
            tails[tail] for tail in difflib.get_close_matches(word, tails, n=1)
        ]
    return f"; did you mean {near[0]}?" if near else ""


def yaml_reason(error: yaml.YAMLError) -> str:
    """The YAML parser's complaint, on one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def explain(error: ValidationError, known: list[str]) -> str:
    """One line about the first validation error, with the number of the others.

    An unknown key comes first, because a misspelt key also causes a "missing key" error.
    """
    problems = sorted(error.errors(), key=lambda p: p["type"] != "unexpected_keyword_argument")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].replace("Input should be", "should be")
    if first["type"] == "unexpected_keyword_argument":
        new = RENAMED.get(key)
        hint = f"; since version 0.2 it is {new}" if new else suggest(key, known)
        line = f"unknown key {key}{hint}"
    elif first["type"] == "missing":
        line = f"missing key {key}"
    elif first["type"] == "value_error":
        line = reason.removeprefix("Value error, ")
    elif first["type"] == "dataclass_type":
        line = f"{key}: should be a section of keys, got {first['input']!r}"
    else:
        line = f"{key}: {reason}, got {first['input']!r}"
    more = len(problems) - 1
    return line + (f" (and {more} more)" if more else "")
