"""Run by test_dry_run.py in a fresh process: measured and expected peaks of every phase, as JSON.

For each list of overrides two steps of a recipe, after one of another trainer: oneDNN keeps what it
compiles for each shape, up to 100 MiB, and libraries load and threads start once.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks import resident
from opsd_train.config.load import config_from
from opsd_train.config.schema import Config
from opsd_train.distributed.context import DistributedContext, resolve_device
from opsd_train.dry_run.plan import expected
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.trainer import Trainer
from tests.helpers import tiny
from tests.helpers.verdicts import made_up

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeakTimer(PhaseTimer):
    """Also keeps the peak of each phase's last run."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        settled()
        resident.reset_peak()
        with super().phase(name):
            yield
        self.peaks[name] = resident.peak()


def settled() -> int:
    """The resident set in bytes, once what small tensors left is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident.resident()


def measure(config: Config, steps: int) -> dict[str, int]:
    gc.collect()
    before = resident.resident()
    timer = PeakTimer()
    context = DistributedContext(resolve_device(config.model.device))
    folder = RunFolder(Path(config.output_dir), context)
    # Grades that arrive in a phase, from processes of their own, are no part of the prediction.
    with timer.phase("load"), made_up():
        trainer = Trainer(config, context, folder, timer, "full")
    for step in range(steps):
        trainer.step(step + 1)
    trainer.close()
    return {name: peak - before for name, peak in timer.peaks.items()}


def main(cases: str, model: str, scratch: str) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = []
    for case in json.loads(cases):
        config = config_from(recipe(model, scratch), case)
        measure(config, steps=1)
        phases = {name: phase.total for name, phase in expected(config).items()}
        results.append({"expected": phases, "measured": measure(config, steps=2)})
    print(json.dumps(results))


def recipe(model: str, output_dir: str) -> dict:
    """Two micro-batches of a few thousand tokens, all prompts of about the same length."""
    base = tiny.recipe(model, output_dir)
    return base | {
        "model": base["model"] | {"device": "cpu"},  # the peaks are those of the process
        "problems_per_step": 16,
        "micro_batch_tokens": 1800,
        "lora": base["lora"] | {"target_modules": ALL_LINEAR},
        "data": base["data"] | {"train_size": 48},
        "prompts": {
            "student": "{{ problem.question }}" + " word" * 25,
            "teacher": "{{ problem.question }} {{ problem.solution }}" + " word" * 25,
            "max_prompt_tokens": 400,
        },
        "rollout": {"max_new_tokens": 24, "batch_tokens": 4000},
        "evaluation": {"problems": 0, "max_new_tokens": 5},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
