"""Sections of the methods."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from opsd_train.config.engine_schema import server_faults
from opsd_train.config.loss_schema import IMPORTANCE_CAP, PolicyWeightConfig
from opsd_train.config.section import (
    NonNegativeReal,
    Positive,
    PositiveReal,
    UnitInterval,
    section,
)


@section
class VerifyConfig:
    """Loss weights of a trajectory, by the check of its answer."""

    correct: NonNegativeReal = 1.0
    """Loss weight of the tokens of a trajectory with a correct answer."""
    wrong: NonNegativeReal = 0.0
    """Loss weight of the tokens of a trajectory with a wrong answer; 0 leaves it out."""


@section
class OpsdConfig:
    """Method opsd: on-policy self-distillation."""

    teacher: Literal["initial", "ema", "current", "resync"] = "initial"
    """Teacher's weights: the initial ones, a moving average of the student's, the student's, or a
    copy of the student's that is made again every resync_every steps."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """teacher=ema: average = decay * average + (1 - decay) * student after each optimizer step."""
    resync_every: Positive = 20
    """teacher=resync: steps after which the teacher gets the student's weights."""
    verify_weight: VerifyConfig | None = None
    """Weight trajectories by their answer check (the paper's Appendix A); null: all weigh 1."""


@section
class TeacherOptions:
    """How a teacher of method distill is read."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the teacher's weights and computation."""
    prompt: Literal["student", "teacher"] = "student"
    """The prompt that the teacher reads: the student's, or prompts.teacher, with the solution."""
    cache: str | None = None
    """Folder of the teacher's most likely tokens, which cache-teacher writes: its model is not
    loaded then. Needs loss.objective=top_k and distill.on_policy=false; null: none."""
    servers: list[str] = Field(default_factory=list)
    """URLs of vLLM servers of the teacher, such as http://host:8000: its model is not loaded here.
    Needs loss.objective=top_k and loss.temperature=1."""

    @property
    def in_memory(self) -> bool:
        """Whether the teacher's model is loaded."""
        return self.cache is None and not self.servers

    @model_validator(mode="after")
    def _servers_fit(self) -> "TeacherOptions":
        if self.cache is not None and self.servers:
            raise ValueError("distill.cache and distill.servers: set one of them")
        for reason in server_faults("distill.servers", self.servers):
            raise ValueError(reason)
        return self


@section
class TeacherConfig(TeacherOptions):
    """One of several teachers."""

    teacher: str
    """Folder or hub name of the teacher."""


@section
class DistillConfig(TeacherOptions):
    """Method distill: distillation from another model, or from several."""

    teacher: str | None = None
    """Folder or hub name of the teacher; any size, but with the student's tokenizer."""
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """Several teachers instead, by the names in the column data.columns.teacher of the problems:
    {NAME: {teacher: ..., dtype: ..., prompt: ..., cache: ..., servers: ...}, ...}."""
    on_policy: bool | UnitInterval = True
    """true: train on the student's samples (Eq. 3); false: on the reference solutions (Eq. 2); a
    number: the probability that a step trains on samples, and not on solutions (GKD's lambda)."""
    sampler_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the teacher in what each token is sampled from, (1 - share) s + share t (MiniLLM's
    alpha); needs rollout.engine=transformers and one teacher in memory."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DistillConfig":
        if (self.teacher is None) == (not self.teachers):
            raise ValueError(
                "distill.teacher names the teacher, or distill.teachers several: set one of them, "
                "and the other to null"
            )
        alone = TeacherOptions()
        for name in ("dtype", "prompt", "cache", "servers") if self.teachers else ():
            if getattr(self, name) != getattr(alone, name):
                raise ValueError(
                    f"distill.{name} is of distill.teacher: with several teachers set "
                    f"distill.teachers.NAME.{name}"
                )
        caches = [teacher.cache for teacher in self.teachers.values() if teacher.cache]
        if len(set(caches)) < len(caches):
            raise ValueError("distill.teachers: two teachers have the same cache")
        return self

    def by_name(self) -> dict[str | None, TeacherConfig]:
        """The teachers by the name that a problem's `teacher` has; a single one's is None."""
        if self.teacher is None:
            return dict(self.teachers.items())
        own = TeacherConfig(
            teacher=self.teacher, dtype=self.dtype, prompt=self.prompt, cache=self.cache,
            servers=self.servers,
        )  # fmt: skip
        return {None: own}


@section
class GrpoConfig:
    """Method grpo, group-relative policy optimisation; in method opsd, its policy gradient beside
    the divergence."""

    weight: NonNegativeReal = 1.0
    """method=opsd: weight of the policy gradient in the loss."""
    clip_low: NonNegativeReal = 0.2
    """Lower clip of the probability ratio new / old policy: 1 - clip_low."""
    clip_high: NonNegativeReal = 0.28
    """Upper clip of the probability ratio: 1 + clip_high."""
    kl_weight: NonNegativeReal = 0.0
    """Weight of the KL divergence from the initial policy, in the policy gradient's term."""
    kl_estimator: Literal["k3", "k2"] = "k3"
    """Its estimate at the sampled token: k3, r - 1 - log r, or k2, (log r)^2 / 2, with r the
    probability ratio of initial and present policy."""
    normalise_std: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""
    mask_truncated: bool = True
    """Leave completions that were cut off at rollout.max_new_tokens out of the policy gradient."""
    importance_cap: PositiveReal | None = IMPORTANCE_CAP
    """Truncated importance sampling: cap on a token's ratio trainer / sampler; null: none."""
    token_weight: PolicyWeightConfig = Field(default_factory=PolicyWeightConfig)
