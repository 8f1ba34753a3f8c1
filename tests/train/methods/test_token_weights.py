"""The factors of a token's weight, each from its own formula."""

import math
from dataclasses import replace

import pytest
import torch

from opsd_train.config.loss_schema import CreditConfig, PolicyWeightConfig, TokenWeightConfig
from opsd_train.data.batches import Sample
from opsd_train.data.problems import Problem
from opsd_train.methods.objective import following_mean
from opsd_train.methods.token_weights import (
    FACTORS,
    TokenFacts,
    counted,
    found_weight,
    position_weight,
)

DELTAS = [[0.5, -1.0, 2.0, 0.0], [3.0], [-0.25, -0.75]]
ADVANTAGES = [1.5, -0.5, 0.0]


def facts(**more) -> TokenFacts:
    samples = [
        Sample(Problem(str(index), "", "", ""), [1], None, [2] * len(delta))
        for index, delta in enumerate(DELTAS)
    ]
    made = TokenFacts.of(samples, torch.device("cpu"))
    advantage = torch.tensor(ADVANTAGES)[made.sample]
    return replace(made, delta=flat(DELTAS), advantage=advantage, **more)


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row])


def weight(**settings) -> list[float]:
    config = TokenWeightConfig(**settings)
    known, found = position_weight(config, facts()), found_weight(config, facts())
    assert (known is None) != (found is None)
    return (found if known is None else known).tolist()


def test_positions() -> None:
    assert weight(skip_first=2) == [0, 0, 1, 1, 0, 0, 0]
    assert weight(count_first=1) == [1, 0, 0, 0, 1, 1, 0]
    assert weight(skip_first=1, count_first=3) == [0, 1, 1, 0, 0, 0, 1]
    assert [counted(TokenWeightConfig(skip_first=1, count_first=3), n) for n in (0, 1, 2, 9)] == [
        0, 0, 1, 2,
    ]  # fmt: skip


def test_early_tokens_weigh_more() -> None:
    wanted = []
    for delta in DELTAS:
        sizes = [abs(value) for value in delta]
        wanted += [1 + 0.5 * (1 - sum(sizes[:n]) / sum(sizes)) for n in range(len(sizes))]
    assert weight(early=0.5) == pytest.approx(wanted)
    assert wanted[0] == 1.5 and wanted[3] == 1.0  # the last one of the first sample
    same = replace(facts(), delta=torch.zeros(7))
    assert found_weight(TokenWeightConfig(early=0.5), same).tolist() == [1.5] * 7


def test_early_is_exact_far_into_a_micro_batch() -> None:
    """Sums over 200,000 tokens before it do not round away a sample's own."""
    count = 200_000
    long = TokenFacts(
        torch.tensor([0] * count + [1, 1]),
        torch.tensor([*range(count), 0, 1]),
        delta=torch.tensor([100.0] * count + [1e-3, 3e-3]),
    )
    assert found_weight(TokenWeightConfig(early=1.0), long)[-2:].tolist() == pytest.approx(
        [2.0, 1.75], rel=1e-5
    )


def test_gate() -> None:
    wanted = [1 / (1 + math.exp(-5 * value)) for row in DELTAS for value in row]
    assert weight(gate=5.0) == pytest.approx(wanted)


def test_importance() -> None:
    config = TokenWeightConfig(importance_cap=2.0)
    own, sampler = torch.full((7,), -1.0), torch.tensor([-1.0, -3.0, 0.0, -1.5, -1, -1, -1])
    found = found_weight(config, facts(logprob=own, sampler=sampler)).tolist()
    assert found == pytest.approx([1, 2, math.exp(-1), math.exp(0.5), 1, 1, 1])
    assert found_weight(config, facts(logprob=own)).tolist() == [1] * 7  # an evaluation


@pytest.mark.parametrize(("step", "mix"), [(1, 0.5), (3, 0.25), (5, 0.0), (9, 0.0)])
def test_credit_and_its_decay(step: int, mix: float) -> None:
    credit = CreditConfig(mix=0.5, clip=0.2, decay_steps=4)
    found = found_weight(PolicyWeightConfig(credit=credit), facts(step=step)).tolist()
    wanted = []
    for advantage, row in zip(ADVANTAGES, DELTAS, strict=True):
        sign = (advantage > 0) - (advantage < 0)
        wanted += [1 - mix + mix * min(max(math.exp(sign * d), 0.8), 1.2) for d in row]
    assert found == pytest.approx(wanted)
    if step == 1:  # up where teacher and advantage agree, down where they do not
        assert found[0] == pytest.approx(1.1) and found[1] == pytest.approx(0.9)
        assert found[4] == pytest.approx(0.9) and found[5:] == [1, 1]


def test_credit_without_decay_stays() -> None:
    stays = PolicyWeightConfig(credit=CreditConfig())
    first, late = (found_weight(stays, facts(step=step)) for step in (1, 1000))
    assert torch.equal(first, late) and first[0] > 1


def test_factors_multiply() -> None:
    config = TokenWeightConfig(early=0.5, gate=5.0)
    one, other = weight(early=0.5), weight(gate=5.0)
    product = [a * b for a, b in zip(one, other, strict=True)]
    assert found_weight(config, facts()).tolist() == pytest.approx(product)


def test_mean_of_what_follows() -> None:
    wanted = [(-1 + 2 + 0) / 3, 1.0, 0.0, 0, 0, -0.75, 0]
    assert following_mean(facts(), flat(DELTAS)).tolist() == pytest.approx(wanted)


FORMULAS = {
    "skip_first": test_positions,
    "count_first": test_positions,
    "early": test_early_tokens_weigh_more,
    "gate": test_gate,
    "importance_cap": test_importance,
    "credit": test_credit_and_its_decay,
}
"""The test of each factor's formula."""


def test_every_factor_has_a_key_and_a_test() -> None:
    keys = {**TokenWeightConfig.__pydantic_fields__, **PolicyWeightConfig.__pydantic_fields__}
    assert set(FACTORS) == set(keys) == set(FORMULAS)
