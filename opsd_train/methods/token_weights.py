"""What a token counts in a term of the loss: a product of factors, each a key of the recipe.

The factors are those of `loss.token_weight` for the divergence, and of `grpo.token_weight` for the
policy gradient. All are constants: no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_train.config.loss_schema import CreditConfig, PositionsConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.common import importance_weight


@dataclass(frozen=True)
class TokenFacts:
    """What the factors are computed from: (N,) constants, the tokens of a sample side by side.

    None: not known, and no factor of the recipe needs it.
    """

    sample: Tensor  # int64, the index of the token's sample
    position: Tensor  # int64, in its completion, from 0
    delta: Tensor | None = None  # log t(y) - log s(y); 0 where the teacher sees nothing
    logprob: Tensor | None = None  # log s(y)
    sampler: Tensor | None = None  # log q(y)
    advantage: Tensor | None = None  # of the sample
    step: int = 1  # training step, from 1

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device) -> TokenFacts:
        """What the samples alone say."""
        lengths = torch.tensor([len(sample.completion) for sample in samples])
        numbers = torch.arange(len(samples)).repeat_interleave(lengths)
        positions = [torch.arange(length) for length in lengths.tolist()]
        return cls(numbers.to(device), torch.cat(positions).to(device))


def skip_first(facts: TokenFacts, count: int) -> Tensor:
    """0 for the first `count` tokens of a completion (SDFT, arXiv 2601.19897, Section 5)."""
    return (facts.position >= count).float()


def count_first(facts: TokenFacts, count: int) -> Tensor:
    """0 after the first `count` tokens of a completion (Prefix OPD, arXiv 2602.15260)."""
    return (facts.position < count).float()


def early(facts: TokenFacts, gamma: float) -> Tensor:
    """1 + gamma (1 - sum_{m<n} |delta_m| / sum_m |delta_m|) (IW-OPD, arXiv 2606.22600)."""
    size = _known(facts.delta).abs()
    before, total = sums_before(facts, size)
    share = torch.where(total > 0, before / total, 0).clamp(0, 1)
    return (1 + gamma * (1 - share)).to(size)


def gate(facts: TokenFacts, slope: float) -> Tensor:
    """sigmoid(slope * delta) (SDAR, arXiv 2605.15155)."""
    return torch.sigmoid(slope * _known(facts.delta))


def truncated_importance(facts: TokenFacts, cap: float) -> Tensor:
    """min(s / q, cap); 1 for the completions of an evaluation, which have no q."""
    own = _known(facts.logprob)
    return (
        torch.ones_like(own)
        if facts.sampler is None
        else importance_weight(own, facts.sampler, cap)
    )


def credit(facts: TokenFacts, settings: CreditConfig) -> Tensor:
    """1 - m + m clip(exp(sign(A) delta), 1 -+ clip), m falling over the steps (RLSD, arXiv
    2604.03128, Eq. 13-15, and its code for the schedule)."""
    mix = settings.mix
    if settings.decay_steps:
        mix *= max(1 - (facts.step - 1) / settings.decay_steps, 0)
    # The bounds of the clip make a larger exponent the same.
    exponent = (_known(facts.advantage).sign() * _known(facts.delta)).clamp(-20, 20)
    factor = exponent.exp().clamp(1 - settings.clip, 1 + settings.clip)
    return 1 - mix + mix * factor


FACTORS: dict[str, Callable[[TokenFacts, Any], Tensor]] = {
    "skip_first": skip_first,
    "count_first": count_first,
    "early": early,
    "gate": gate,
    "importance_cap": truncated_importance,
    "credit": credit,
}
"""By the key of TokenWeightConfig or PolicyWeightConfig that sets it."""

POSITIONS = ("skip_first", "count_first")
"""Those that the samples alone say: tokens of weight 0 then cost no product."""


def position_weight(config: PositionsConfig, facts: TokenFacts) -> Tensor | None:
    """(N,) product of the factors that positions decide; None if the recipe has none."""
    return _product(config, facts, POSITIONS)


def found_weight(config: PositionsConfig, facts: TokenFacts) -> Tensor | None:
    """(N,) product of the factors that the models' probabilities decide; None if there is none."""
    return _product(config, facts, [name for name in FACTORS if name not in POSITIONS])


def has_found(config: PositionsConfig) -> bool:
    """Whether `found_weight` has a factor."""
    return any(getattr(config, name, None) is not None for name in FACTORS if name not in POSITIONS)


def sums_before(facts: TokenFacts, values: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) sums of the (N,) values over the tokens of a token's sample: those before it, and all.

    In float64: they are differences of sums over the whole micro-batch.
    """
    values = values.double()
    count = int(facts.sample.max()) + 1
    totals = values.new_zeros(count).index_add_(0, facts.sample, values)
    starts = totals.cumsum(0) - totals
    return values.cumsum(0) - values - starts[facts.sample], totals[facts.sample]


def counted(config: PositionsConfig, length: int) -> int:
    """The tokens of a completion of this length that `position_weight` does not leave out."""
    last = length if config.count_first is None else min(length, config.count_first)
    return max(last - (config.skip_first or 0), 0)


def _product(config: PositionsConfig, facts: TokenFacts, names: Sequence[str]) -> Tensor | None:
    product: Tensor | None = None
    for name in names:
        setting = getattr(config, name, None)
        if setting is not None:
            factor = FACTORS[name](facts, setting)
            product = factor if product is None else product * factor
    return product


def _known(fact: Tensor | None) -> Tensor:
    assert fact is not None, "a factor of the recipe needs it"
    return fact
