"""The loss of opsd and distill: its terms, and the weights of tokens in them."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from opsd_train.config.section import (
    Count,
    NonNegativeReal,
    Positive,
    PositiveReal,
    UnitInterval,
    section,
)

TOP_K = 64
"""Default of loss.top_k."""
IMPORTANCE_CAP = 2.0
"""Default of grpo.importance_cap, and the cap for sampled tokens of older weights."""


@section
class CreditConfig:
    """The teacher's word on which tokens an advantage is due to (RLSD)."""

    mix: UnitInterval = 0.5
    """Share of the teacher's factor: 1 - mix + mix * clip(exp(sign(A) (log t - log s)))."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The factor is clipped to 1 - clip and 1 + clip."""
    decay_steps: Count = 0
    """The share falls linearly to 0 over so many steps; 0: it stays."""


@section
class PositionsConfig:
    """Which tokens of a completion count."""

    skip_first: Positive | None = None
    """How many tokens at the start of each completion to leave out."""
    count_first: Positive | None = None
    """Count only this many tokens at the start of each completion."""

    @property
    def some(self) -> bool:
        """Whether some positions count and others do not."""
        return self.skip_first is not None or self.count_first is not None


@section
class TokenWeightConfig(PositionsConfig):
    """Factors of a token's weight in the objective; those that are set are multiplied. s and t are
    the student's and the teacher's probability of the sampled token."""

    early: PositiveReal | None = None
    """1 + early * (1 - share), where the share is the part of the completion's sum of
    abs(log t - log s) that comes before the token (IW-OPD)."""
    gate: PositiveReal | None = None
    """sigmoid(gate * (log t - log s)) (SDAR)."""
    importance_cap: PositiveReal | None = None
    """min(s / q, importance_cap), q the sampler's probability: truncated importance sampling."""


@section
class PolicyWeightConfig(PositionsConfig):
    """Factors of a token's weight in the policy gradient of method opsd."""

    credit: CreditConfig | None = None
    """The teacher says which tokens an advantage is due to (RLSD); null: all alike."""


FROM_TEACHER = ("early", "gate")
"""Factors of the objective that need the teacher's probability of the sampled token."""


@section
class ForwardKlConfig:
    """A forward KL at tokens where the teacher is unsure (EOPD)."""

    weight: PositiveReal = 1.0
    """Weight of the term."""
    min_entropy: NonNegativeReal = 0.8
    """The term applies where the teacher's entropy is at least this, in nats."""


@section
class LossConfig:
    """The divergence between student and teacher (opsd, distill)."""

    objective: Literal["full_vocabulary", "top_k", "sampled_token", "log_ratio"] = "full_vocabulary"
    """Divergence over the full vocabulary (Eq. 6-8), over the teacher's most likely tokens and the
    rest as one outcome, sampled-token policy gradient (Eq. 9), or log t - log s of the sampled
    token, which needs token_weight.gate (SDAR)."""
    weight: NonNegativeReal = 1.0
    """Weight of the objective in the loss, beside that of a policy gradient (grpo.weight)."""
    top_k: Positive = TOP_K
    """objective=top_k: how many of the teacher's most likely tokens; at most the vocabulary."""
    beta: UnitInterval = 0.5
    """0: forward KL, 1: reverse KL, in between: generalised Jensen-Shannon divergence."""
    temperature: PositiveReal = 1.0
    """Temperature that divides the logits of student and teacher in the loss."""
    token_clip: PositiveReal | None = None
    """Cap on the contribution of each vocabulary entry to a token's divergence; null: none."""
    clip_low: NonNegativeReal = 0.2
    """objective=sampled_token with updates_per_step > 1: lower clip of the probability ratio."""
    clip_high: NonNegativeReal = 0.2
    """The same: upper clip of the probability ratio, 1 + clip_high."""
    forward_kl: ForwardKlConfig | None = None
    """Add a forward KL at tokens where the teacher is unsure; null: no such term."""
    long_term: NonNegativeReal = 0.0
    """Weight of a policy gradient whose advantage is the mean of log t - log s over the tokens that
    follow (MiniLLM); needs the reverse KL, objective=full_vocabulary and beta=1."""
    token_weight: TokenWeightConfig = Field(default_factory=TokenWeightConfig)

    @property
    def at_samples(self) -> bool:
        """Whether the objective reads the sampled token alone."""
        return self.objective in ("sampled_token", "log_ratio")

    @model_validator(mode="after")
    def _fits_together(self) -> "LossConfig":
        for reason in self._conflicts():
            raise ValueError(reason)
        return self

    def _conflicts(self) -> Iterator[str]:
        weights = self.token_weight
        if self.objective != "full_vocabulary" and self.token_clip is not None:
            yield "loss.token_clip works with loss.objective=full_vocabulary only"
        if self.objective != "top_k" and self.top_k != TOP_K:
            yield f"loss.top_k={self.top_k} needs loss.objective=top_k"
        if self.objective == "log_ratio" and weights.gate is None:
            yield (
                "loss.objective=log_ratio has an expected gradient of 0 without a gate: set "
                "loss.token_weight.gate, such as 5"
            )
        if self.long_term and (self.objective, self.beta) != ("full_vocabulary", 1):
            yield "loss.long_term needs loss.objective=full_vocabulary and loss.beta=1"
        if self.long_term and weights.some:
            yield (
                "loss.long_term reads all tokens that follow: leave loss.token_weight.skip_first "
                "and count_first out"
            )
        for name in FROM_TEACHER if self.objective == "top_k" else ():
            if getattr(weights, name) is not None:
                yield (
                    f"loss.token_weight.{name} needs the teacher's probability of the sampled "
                    "token, which loss.objective=top_k does not have"
                )
        if self.forward_kl and self.objective == "top_k":
            yield "loss.forward_kl needs the teacher's whole distribution: not loss.objective=top_k"
