"""Tokens per second of our rollout engine and of transformers' `model.generate`.

    python -m benchmarks.decode                        # about 6 minutes
    python -m benchmarks.decode --dtypes bfloat16

SmolLM2-135M without adapters, prompts of the demo's held-out problems. TOKENS tokens follow each
prompt, sampled at temperature 1 from the whole vocabulary; no token stops. Both have the same model
in one process and decode one batch. They take turns, and in each round the other one begins. The
time is that of the whole call, prompts included.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.environment import environment
from opsd_train.config.load import config_from, load_recipe
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import PromptBuilder
from opsd_train.model.policy import Policy, load_model, load_tokenizer
from opsd_train.rollout import Request, Sampling
from opsd_train.rollout.transformers_engine import TransformersEngine

OUT = Path("runs/benchmarks/decode.json")
DTYPES = ("bfloat16", "float32")
ROUNDS = {1: 9, 16: 5, 48: 3, 64: 3}  # by sequences in the batch: short calls vary more
TOKENS = 32
_PACKAGES = ("torch", "transformers")


class Contenders:
    """Our engine and `generate` on one model; each call returns the number of new tokens."""

    def __init__(self, dtype: str) -> None:
        batch_tokens = 512 * max(ROUNDS)  # every batch is one of the engine's
        overrides = [f"model.dtype={dtype}", f"rollout.batch_tokens={batch_tokens}"]
        config = config_from(load_recipe("demo/opsd"), overrides)
        tokenizer = load_tokenizer(config.model)
        self.pad_id = tokenizer.pad_token_id
        self.model: PreTrainedModel = load_model(config.model, tokenizer, getattr(torch, dtype))
        self.model.generation_config.eos_token_id = None  # generate would fall back to it
        policy = Policy(self.model.eval(), self.pad_id, self.model.dtype)
        self.engine = TransformersEngine(policy, tokenizer, config.rollout)
        self.engine.stop = frozenset()
        builder = PromptBuilder(tokenizer, config.prompts)
        self.prompts = [builder.student(problem) for problem in load_problems(config.data)[1]]

    def ours(self, batch: int, tokens: int, seed: int) -> int:
        requests = [Request(prompt, seed + i) for i, prompt in enumerate(self.prompts[:batch])]
        made = self.engine.generate(requests, Sampling(tokens, temperature=1.0))
        return sum(len(completion.tokens) for completion in made)

    @torch.no_grad()
    def generate(self, batch: int, tokens: int, seed: int) -> int:
        prompts = self.prompts[:batch]
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[self.pad_id] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        torch.manual_seed(seed)
        sampling = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=self.pad_id,
        )  # fmt: skip
        made = self.model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            generation_config=sampling,
        )
        return made[:, width:].numel()


def measure(dtype: str) -> list[dict[str, Any]]:
    """One row per batch: the seconds of every round, by contender."""
    contenders = Contenders(dtype)
    calls = {"ours": contenders.ours, "generate": contenders.generate}
    rows = []
    for batch, rounds in ROUNDS.items():
        for call in calls.values():
            call(batch, 2, seed=0)  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            order = list(calls) if number % 2 == 0 else list(reversed(calls))
            for name in order:
                call = partial(calls[name], batch, TOKENS, 1 + number * max(ROUNDS))
                seconds[name].append(_timed(call, batch * TOKENS))
        rows.append({"dtype": dtype, "batch": batch, "tokens": TOKENS, "seconds": seconds})
        print(line(rows[-1]), flush=True)
    return rows


def _timed(call: Callable[[], int], expected: int) -> float:
    start = time.perf_counter()
    made = call()
    seconds = time.perf_counter() - start
    if made != expected:
        raise RuntimeError(f"{made} tokens came and not {expected}")
    return seconds


def line(row: dict[str, Any]) -> str:
    """A row of the terminal's table."""
    made = row["batch"] * row["tokens"]
    ours, theirs = (made / median(row["seconds"][name]) for name in ("ours", "generate"))
    return (
        f"{row['dtype']:10} {row['batch']:5} {ours:9.1f} tok/s {theirs:9.1f} tok/s "
        f"{ours / theirs:6.2f}"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.decode", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures as JSON ({OUT})")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"{'dtype':10} {'batch':>5} {'ours':>15} {'generate':>15} {'ratio':>6}")
    rows = [row for d in options.dtypes for row in measure(d)]
    result = {
        "kind": "decode",
        "environment": environment(packages=_PACKAGES),
        "settings": {"model": "SmolLM2-135M", "tokens": TOKENS},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
