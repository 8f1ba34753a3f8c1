"""Steps of the trainer with the paper's recipe on a random model of Qwen3-1.7B's shape.

Seconds and peak memory of each phase. Texts are made up, a token a character; a random model hardly
ever ends a completion, so that all have the same length.
"""

from __future__ import annotations

import json
import string
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report.job import GpuJob
from benchmarks.gpu_report.step import QWEN3_17B, TINY
from benchmarks.gpu_report.work import Absent, one_by_one

Series = dict[str, list[float]]
RECIPES = ("paper/opsd-qwen3-1.7b", "paper/opsd-sampled-qwen3-1.7b")


@dataclass(frozen=True)
class Settings:
    """A step of the run: problems of one sample each, lengths in tokens."""

    problems: int = 8
    question: int = 200
    solution: int = 800
    completion: int = 256
    steps: int = 3  # measured; one more is the warm-up
    dtype: str = "bfloat16"


_SMALL = Settings(2, 8, 12, 4, 1, "float32")


def shards(job: GpuJob) -> list[list[str]]:
    """All recipes in one process. Raises Absent without the trainer's requirements."""
    try:
        import opsd_train.trainer  # noqa: F401
    except ImportError as error:
        raise Absent(f"the trainer cannot be imported: {error}") from error
    return [list(RECIPES)]


def run(recipe: str, job: GpuJob) -> dict[str, Any]:
    """Take the steps of a recipe; of each phase the seconds and the peak in MiB of every step."""
    from opsd_train.config.load import config_from, load_recipe
    from opsd_train.dry_run.plan import expected

    settings = _SMALL if job.small else Settings()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save_model(folder / "model", TINY if job.small else QWEN3_17B, job.device)
        _write_problems(folder / "problems.jsonl", settings)
        config = config_from(load_recipe(recipe), _overrides(folder, settings, job))
        predicted = {phase: memory.total / 2**20 for phase, memory in expected(config).items()}
        seconds, peaks = _steps(config, settings, job.device)
    return {
        "settings": asdict(settings),
        "seconds": {phase: values[1:] for phase, values in seconds.items()},
        "peak_mib": {phase: values[1:] for phase, values in peaks.items() if phase in seconds},
        "expected_mib": predicted,
    }


def _overrides(folder: Path, settings: Settings, job: GpuJob) -> list[str]:
    return [
        f"output_dir={folder / 'run'}",
        f"model.name_or_path={folder / 'model'}",
        f"model.dtype={settings.dtype}",
        f"model.device={job.device.type}",
        "data.source=file",
        f"data.path={folder / 'problems.jsonl'}",
        "data.columns={question: question, answer: answer, solution: solution}",
        "data.heldout_size=1",
        f"problems_per_step={settings.problems}",
        "rollout.engine=transformers",
        f"rollout.max_new_tokens={settings.completion}",
        f"steps={settings.steps + 1}",
    ]


def _steps(config: Any, settings: Settings, device: torch.device) -> tuple[Series, Series]:
    """Of each phase the seconds and, on a GPU, the peak in MiB of every step."""
    from opsd_train.distributed.context import init_distributed
    from opsd_train.reporting.run_folder import RunFolder
    from opsd_train.trainer import STEP_PHASES, Trainer

    timer, context = _timer(device), init_distributed(config.model.device)
    trainer = Trainer(config, context, RunFolder(Path(config.output_dir), context), timer, "full")
    rows = [trainer.step(step)[0] for step in range(1, settings.steps + 2)]
    trainer.close()
    return {phase: [row[f"seconds_{phase}"] for row in rows] for phase in STEP_PHASES}, timer.peaks


def _timer(device: torch.device) -> Any:
    """A timer that on a GPU also keeps each phase's `peaks` in MiB, in their order."""
    from opsd_train.reporting.timers import PhaseTimer, peak_memory_mib

    class Timer(PhaseTimer):
        def __init__(self) -> None:
            super().__init__()
            self.peaks: Series = defaultdict(list)

        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with super().phase(name):
                yield
            if device.type == "cuda":
                self.peaks[name].append(peak_memory_mib(device))

    return Timer()


def _save_model(folder: Path, shape: dict[str, Any], device: torch.device) -> None:
    """Random weights, and a tokenizer that has a token for each entry of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[: shape["vocab_size"] - 2]
    words = [f"word{index}" for index in range(shape["vocab_size"] - 2 - len(characters))]
    vocabulary = {token: index for index, token in enumerate(["<end>", "<pad>"])}
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate([*characters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=chat
    ).save_pretrained(folder)
    torch.manual_seed(0)
    with device:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, eos_token_id=0)).bfloat16()
    model.save_pretrained(folder)


def _write_problems(path: Path, settings: Settings) -> None:
    letters = string.ascii_lowercase
    rows = [
        {
            "question": f"{k}".ljust(settings.question, letters[k % 26]),
            "solution": "".join(letters[(i + k) % 26] for i in range(settings.solution)),
            "answer": str(k),
        }
        for k in range(1, 4 * settings.problems)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


work = one_by_one(run)
