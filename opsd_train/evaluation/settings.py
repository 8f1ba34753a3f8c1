"""The recipe of an evaluation: every key with its meaning."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opsd_train.config.schema import (
    Count,
    ModelConfig,
    NonNegativeReal,
    Positive,
    PositiveReal,
    PromptsConfig,
    RolloutConfig,
    section,
)
from opsd_train.data.files import is_data_file


@section
class EvalPromptsConfig:
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
        """The same for prompts.PromptBuilder, which takes a student's and a teacher's."""
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
class SamplingConfig:
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates the completions."""
    samples: Positive
    """Completions of each problem."""
    max_new_tokens: Positive
    """Longest completion."""
    temperature: NonNegativeReal = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability; 1 is all of them."""
    top_k: Count = 0
    """Sample from this many likeliest tokens; 0 is all of them."""
    stop_tokens: list[str] = Field(default_factory=list)
    """Tokens that end a completion, beside the model's own end tokens."""
    batch_tokens: Positive
    """transformers: most tokens, prompts and completion limits together, generated at a time."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """vllm: share of the GPU's memory it may take."""

    @model_validator(mode="after")
    def _fits_together(self) -> "SamplingConfig":
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                "sampling.temperature=0 gives the same completion each time; set sampling.samples=1"
            )
        return self

    def for_engine(self) -> RolloutConfig:
        """The same for a rollout engine."""
        return RolloutConfig(
            engine=self.engine,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=self.stop_tokens,
            batch_tokens=self.batch_tokens,
            vllm_memory=self.vllm_memory,
        )


@section
class FileColumnsConfig:
    question: str = "question"
    """Column of a file that holds the problem's text."""
    answer: str = "answer"
    """Column of a file that holds the answer."""


@section
class GradingConfig:
    seconds: PositiveReal = 10.0
    """Time limit of the check of one answer; one that takes longer counts as wrong."""
    workers: Positive | None = None
    """Processes that check answers; null: one for each core."""


@section
class EvalConfig:
    """How a model is asked and its answers are checked."""

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
    """runs/eval-MODEL-RECIPE-SETS, where a recipe names no output_dir."""
    path = Path(source)
    model = path.name if path.parent.name != "checkpoints" else "-".join(path.parts[-3::2])
    parts = [model, recipe.removesuffix(".yaml"), "-".join(map(_stem, sets))]
    name = "-".join(["eval", *parts])
    return "runs/" + re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def _stem(name: str) -> str:
    return Path(name).stem if is_data_file(name) else Path(name).name
