"""Sections of an evaluation's recipe; `python -m opsd_train --help` prints each key's docstring."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opsd_train.config.schema import EngineConfig, ModelConfig, PromptsConfig
from opsd_train.config.section import Positive, PositiveReal, section
from opsd_train.data.files import is_data_file


@section
class EvalPromptsConfig:
    """The prompts of all sets but held-out problems, which have those of their run."""

    student: str
    """Jinja template of the prompt (problem.question); named as in the recipes of training."""
    system: str | None = None
    """System message."""
    student_chat_template: bool = True
    """Wrap the prompt in the tokenizer's chat template."""
    student_thinking: bool | None = None
    """Passed to the chat template as enable_thinking; null: not passed."""
    max_prompt_tokens: Positive
    """Longest prompt allowed."""
    overlong: Literal["error", "skip"] = "error"
    """What to do with problems that are longer: stop, or leave them out and say so."""

    def for_builder(self) -> PromptsConfig:
        """These settings for a PromptBuilder: student's and teacher's prompts alike."""
        return PromptsConfig(
            student=self.student,
            teacher=self.student,
            system=self.system,
            student_chat_template=self.student_chat_template,
            teacher_chat_template=self.student_chat_template,
            student_thinking=self.student_thinking,
            teacher_thinking=self.student_thinking,
            max_prompt_tokens=self.max_prompt_tokens,
            overlong=self.overlong,
        )


@section
class SamplingConfig(EngineConfig):
    """How completions are sampled, and how many of each problem."""

    samples: Positive
    """Completions of each problem."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.9

    @model_validator(mode="after")
    def _fits_together(self) -> "SamplingConfig":
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                "sampling.temperature=0 gives the same completion each time; set sampling.samples=1"
            )
        return self


@section
class FileColumnsConfig:
    """The columns of a file of problems."""

    question: str = "question"
    """Column of a file that holds the problem's text."""
    answer: str = "answer"
    """Column of a file that holds the answer."""


@section
class GradingConfig:
    """Limits on the processes that check answers."""

    seconds: PositiveReal = 10.0
    """Time limit of the check of one answer; one that takes longer counts as wrong."""
    workers: Positive | None = None
    """Processes that check answers; null: one for each core."""


@section
class EvalConfig:
    """Everything an evaluation is made of: prompts, sampling, problems, grading."""

    seed: int = 0
    """Seed of the completions."""
    output_dir: str
    """The evaluation's folder; null in a recipe: runs/eval-MODEL-RECIPE-SETS."""
    model: ModelConfig
    """The model on the command line, or that of its run, takes the place of name_or_path."""
    prompts: EvalPromptsConfig
    """Of all sets but a run's held-out problems, which come with the run's own prompts."""
    sampling: SamplingConfig
    problems: Positive | None = None
    """The first so many problems of each set; null: all of it."""
    task_problems: Positive = 200
    """Problems made of a reasoning_gym task where `problems` is null."""
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of reasoning_gym tasks, by the task's name; what is not here has the defaults."""
    columns: FileColumnsConfig = Field(default_factory=FileColumnsConfig)
    grading: GradingConfig = Field(default_factory=GradingConfig)


def default_folder(source: str, recipe: str, sets: Sequence[str]) -> str:
    """The folder of a recipe without output_dir: runs/eval-MODEL-RECIPE-SETS."""
    path = Path(source)
    model = path.name if path.parent.name != "checkpoints" else "-".join(path.parts[-3::2])
    parts = [model, recipe.removesuffix(".yaml"), "-".join(map(_stem, sets))]
    name = "-".join(["eval", *parts])
    return "runs/" + re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def _stem(name: str) -> str:
    return Path(name).stem if is_data_file(name) else Path(name).name
