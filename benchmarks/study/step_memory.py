"""Peak memory of a full-vocabulary OPSD micro-step over its tokens: plain logits against ours.

    python -m benchmarks.study.step_memory [--quick] [--out FOLDER]

Every point is measured in a fresh process (one_step.py), one after another, and kept in
FOLDER/memory.jsonl: a second call measures what is missing. FOLDER/memory.json has the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.base import copy_words
from benchmarks.study.one_step import METHODS, StepMethod
from benchmarks.study.settings import load_shared
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import Config
from opsd_train.distributed.context import resolve_device
from opsd_train.dry_run.plan import expected
from opsd_train.model.policy import load_model_config
from opsd_train.reporting.metrics_log import replace_file

LOGIT_BYTES = 56
"""Plain logits at their fullest, per token and vocabulary entry, counted in generalized_jsd.

Logits of both models in bf16 (2 x 2); in float32 (13 x 4) both log-probabilities, their stack (2),
the mixture, both probabilities, ls - lm, both divergences, both times their weights, the sum.
"""
FARTHEST = 65_536  # tokens up to which is predicted

_MARGIN = 1.25  # of what a step is expected to take
_PROCESS = 3 * 2**30  # Python, the libraries, the model and what loading it takes
_MIB = 2**20
_MORE = 100_000  # tokens: more than any budget needs
_STEP = (
    "loss.objective=full_vocabulary",
    "loss.beta=0.5",
    "model.gradient_checkpointing=true",
    "data.heldout_size=0",
    "evaluation.problems=0",
)
# Freed tensors leave the resident set, or they would hide a part of the peak; threads sleep.
_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**16),
    "OMP_WAIT_POLICY": "passive",
}
_AT_REST = ("frozen weights", "adapters, float32", "AdamW's moments")  # there before the step
_QWEN3_8B = 151_936  # vocabulary
_AUTHORS = 4 * 4096  # tokens of the micro-batch that did not fit


@dataclass(frozen=True)
class Law:
    """mib = start + slope x tokens."""

    start: float
    slope: float

    def __call__(self, tokens: int) -> float:
        return self.start + self.slope * tokens

    @classmethod
    def through(cls, points: dict[int, float]) -> Law:
        """Least squares; `points`: MiB by tokens, two or more."""
        slope, start = statistics.linear_regression(list(points), list(points.values()))
        return cls(start, slope)


def measure(tokens: Sequence[int], folder: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Peaks at these numbers of completion tokens, and predicted ones up to FARTHEST.

    `changes`: "key=value" over recipe demo/opsd. A point that the machine has no memory for is
    predicted. Raises UserError where the longest does not fit in the model's context.
    """
    sizes = sorted(set(tokens))
    if len(sizes) < 2:
        raise UserError(f"memory_tokens={list(tokens)}: a law needs two different numbers or more")
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(folder, changes, sizes[-1])
    step = _step(config)
    changes = [*changes, *copy_words(config.model, folder)]
    config = _config(folder, changes, sizes[-1])
    ours = _dry_run(folder, changes, sizes[-1])
    vocab = load_model_config(config.model).get_text_config().vocab_size
    measured: dict[StepMethod, dict[int, float]] = {method: {} for method in METHODS}
    for size, method, known in _points(folder, step, sizes):
        most = ours(sizes[-1]) + (LOGIT_BYTES * size * vocab / _MIB if method == "plain" else 0)
        if known is None and _fits(config, most):
            known = _keep(config, folder, step, size, method)
        if known is not None:
            measured[method][size] = known
    if len(measured["plain"]) < 2:
        raise UserError("too little memory is free for plain logits at two sizes; close programs")
    laws = {"ours": ours, "plain": Law.through(measured["plain"])}
    result = {
        "points": [
            _point(size, method, measured[method].get(size), laws[method])
            for method in METHODS
            for size in [*sizes, *_beyond(sizes[-1])]
        ],
        "note": _note(config, step, measured, laws, vocab),
        "command": _command(sizes),
        "machine_mib": _memory(config)[1] / _MIB,
    }
    replace_file(folder / "memory.json", json.dumps(result, indent=1) + "\n")
    return result


def _point(tokens: int, method: str, mib: float | None, law: Law) -> dict[str, Any]:
    value = law(tokens) if mib is None else mib
    return {"tokens": tokens, "method": method, "mib": round(value, 1), "predicted": mib is None}


def _beyond(largest: int) -> Iterator[int]:
    while (largest := 2 * largest) <= FARTHEST:
        yield largest


def _command(sizes: list[int]) -> str:
    quick = sizes == load_shared().quick.memory_tokens
    return "python -m benchmarks.study.step_memory" + " --quick" * quick


def _config(folder: Path, changes: Sequence[str], tokens: int, sequences: int = 1) -> Config:
    """A step of `sequences` completions in one micro-batch."""
    several = (
        f"output_dir={json.dumps(str(folder))}",
        f"problems_per_step={sequences}",
        f"data.train_size={sequences}",
        f"rollout.max_new_tokens={tokens}",
        f"rollout.batch_tokens={_MORE}",
        f"micro_batch_tokens={sequences * _MORE}",
    )
    return config_from(load_recipe("demo/opsd"), [*_STEP, *several, *changes])


def _dry_run(folder: Path, changes: Sequence[str], tokens: int) -> Law:
    """Ours from `tokens` on, as --dry-run has it; more of them are more sequences."""
    many = -(-FARTHEST // tokens)
    points = {}
    for sequences in (1, many):
        phases = expected(_config(folder, changes, tokens, sequences), "none")
        peaks = [
            sum(size for name, size in phases[phase].parts.items() if name not in _AT_REST)
            for phase in ("teacher", "student")
        ]
        points[sequences * tokens] = max(peaks) / _MIB
    return Law.through(points)


# -------------------------------------------------------------------------------- the measurement


def _points(
    folder: Path, step: str, sizes: Sequence[int]
) -> Iterator[tuple[int, StepMethod, float | None]]:
    """Every point with what is known of it, the small ones first."""
    rows = [row for row in _rows(folder) if row["step"] == step]
    known = {(row["tokens"], row["method"]): row["mib"] for row in rows}
    for size in sizes:
        for method in METHODS:
            yield size, method, known.get((size, method))


def _keep(config: Config, folder: Path, step: str, tokens: int, method: StepMethod) -> float:
    mib = run_one(config, method, tokens)
    row = {"tokens": tokens, "method": method, "mib": mib, "step": step}
    lines = [json.dumps(row) + "\n" for row in [*_rows(folder), row]]
    replace_file(folder / "memory.jsonl", "".join(lines))
    print(f"memory of a step of {tokens:,} tokens, {method}: {mib:,.0f} MiB", flush=True)
    return mib


def run_one(config: Config, method: StepMethod, tokens: int) -> float:
    """MiB that one step takes, in a process of its own."""
    asked = json.dumps({"config": asdict(config), "method": method, "tokens": tokens})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.study.one_step"],
        input=asked,
        env=os.environ | _ENV,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(
            f"a step of {tokens} tokens ({method}) ended with code {done.returncode}: {reason}"
        )
    return json.loads(done.stdout.splitlines()[-1])["mib"]


def _rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "memory.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _step(config: Config) -> str:
    """What is measured: points of another step in the same folder are not these."""
    assert config.lora is not None  # the recipe is demo/opsd
    model, device = config.model, resolve_device(config.model.device).type
    return f"{model.name_or_path} in {model.dtype}, LoRA rank {config.lora.rank}, {device}"


def _fits(config: Config, mib: float) -> bool:
    return _MARGIN * mib * _MIB + _PROCESS <= _memory(config)[0]


def _memory(config: Config) -> tuple[int, int]:
    """Bytes of the device that are free, and all."""
    device = resolve_device(config.model.device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * kilobytes["MemAvailable"], 1024 * kilobytes["MemTotal"]


# --------------------------------------------------------------------------------------- the note


def _note(
    config: Config,
    step: str,
    measured: dict[StepMethod, dict[int, float]],
    laws: dict[str, Law],
    vocab: int,
) -> str:
    plain, ours, law = measured["plain"], measured["ours"], laws["plain"]
    per_logit = law.slope * _MIB / vocab
    qwen = _AUTHORS * _QWEN3_8B
    context = load_model_config(config.model).get_text_config().max_position_embeddings
    sentences = [
        f"Growth of memory in one full-vocabulary OPSD micro-step (teacher's forward, student's "
        f"forward, JSD, backward) of {step}, with gradient checkpointing, over its "
        "completion tokens; measured in fresh processes, beside the loaded model.",
        f"Plain logits: {law.start:,.0f} MiB + {law.slope:.3f} MiB a token through the measured "
        f"points, {per_logit:.1f} bytes a token and vocabulary entry; counted tensors (2 in bf16, "
        f"13 in float32) make {LOGIT_BYTES}.",
        *_check("plain", plain),
        f"Ours is predicted by --dry-run: {laws['ours'].slope:.3f} MiB a token, all of it "
        "hidden states and activations, none of it logits.",
        *_against_dry_run(ours, laws["ours"]),
        *_check("ours", ours),
        f"A sequence of this model ends at {context:,} tokens: beyond, the axis is a micro-batch "
        "of several. Plain logits can be cut into smaller micro-batches as well, one sequence at "
        "the least; what is compared is memory by tokens of a micro-batch.",
        f"Qwen3-8B's plain logits at 4 x 4,096 tokens: {_AUTHORS:,} x {_QWEN3_8B:,} x "
        f"{LOGIT_BYTES} bytes = {qwen * LOGIT_BYTES / 2**30:.0f} GiB, of which the bf16 logits of "
        f"both models are {4 * qwen / 2**30:.0f}, beside 15 of weights (the authors' code ran out "
        "there at 136 of 140 GiB).",
    ]
    return " ".join(sentences)


def _check(method: StepMethod, points: dict[int, float]) -> list[str]:
    """A law through all but the largest, held against the largest."""
    if len(points) < 3:
        return []
    largest = max(points)
    law = Law.through({size: mib for size, mib in points.items() if size < largest})
    off = law(largest) / points[largest] - 1
    return [
        f"A line through the smaller sizes says {law(largest):,.0f} MiB for {method} at "
        f"{largest:,} tokens, {off:+.1%} from the {points[largest]:,.0f} measured."
    ]


def _against_dry_run(points: dict[int, float], law: Law) -> list[str]:
    if not points:
        return []
    largest = max(points)
    off = law(largest) / points[largest] - 1
    return [f"At {largest:,} tokens it says {law(largest):,.0f} MiB, {off:+.1%} from measured."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps")
    parser.add_argument("--out", type=Path, default=Path("runs/study-memory"), help="folder")
    options = parser.parse_args()
    shared = load_shared()
    size = shared.quick if options.quick else shared.full
    try:
        print(measure(size.memory_tokens, options.out)["note"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
