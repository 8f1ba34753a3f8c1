"""Two ranks with the same vLLM servers: rank 0 hands the adapter over, each sends its requests."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from opsd_train.rollout import Completion
from tests.helpers.pair import Pair, alone
from tests.helpers.steps import Course, Outcome, follow
from tests.helpers.vllm_double import VllmDouble, tiny

pytestmark = pytest.mark.dist


@pytest.fixture
def doubles() -> Iterator[list[VllmDouble]]:
    made = [VllmDouble(tiny()), VllmDouble(tiny())]
    yield made
    for double in made:
        double.kill()


def served(models: Path, doubles: list[VllmDouble], shard: str = "full") -> Course:
    urls = ",".join(double.url for double in doubles)
    engine = ("rollout.engine=vllm-server", f"rollout.servers=[{urls}]")
    return Course(models, overrides=engine, shard=shard)


def assert_same(one: Outcome, ranks: list[Outcome]) -> None:
    """Samples and weights after two steps."""
    for wanted, *parts in zip(one.samples, *(rank.samples for rank in ranks), strict=True):
        made = [sample[:2] for part in parts for sample in part]
        assert sorted(made) == sorted(sample[:2] for sample in wanted)
    for rank in ranks:
        for name, weight in one.weights.items():
            assert (weight - rank.weights[name]).abs().max() < 2e-4, name


@pytest.mark.parametrize("shard", ["full", "none"])
def test_two_ranks_are_one_process(models: Path, pair: Pair, doubles, shard: str) -> None:
    one = follow(alone(), Course(models))
    assert_same(one, pair.run(follow, served(models, doubles, shard)))
    for double in doubles:
        # At the start and before each of two steps, once for both ranks.
        words = [event.split()[0] for event in double.events]
        assert words == ["load", "load", "unload", "load", "unload"]
        assert len(double.bodies) == 2 + 2 * 2  # two checks; of each step half the samples


def test_two_ranks_are_one_process_with_samples_a_step_ahead(models: Path, pair: Pair, doubles):
    course = served(models, doubles)
    overrides = (*course.overrides, "rollout.ahead=1", "steps=3", "loss.objective=sampled_token")
    course = replace(course, overrides=overrides, steps=3)
    one, ranks = follow(alone(), course), pair.run(follow, course)
    assert_same(one, ranks)
    for name in ("loss", "importance", "sampler_mismatch"):
        found = [[row[name] for row in outcome.rows] for outcome in (one, ranks[0])]
        assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5), name
    assert [row["sample_age"] for row in ranks[0].rows] == [0, 1, 1]
    assert one.rows[2]["sampler_mismatch"] > 1e-3


def test_a_server_that_dies_is_missed_by_both(models: Path, pair: Pair, doubles) -> None:
    own, broken, asked = doubles[1].answer, doubles[1], itertools.count(1)

    def answer(body: dict, folder: str | None) -> Completion:
        if next(asked) == 4:  # after two checks and a sample of one rank
            broken.kill()
        return own(body, folder)

    broken.answer = answer
    one = follow(alone(), Course(models))
    assert_same(one, pair.run(follow, served(models, doubles)))
    assert next(asked) == 5 and len(broken.events) == 3
    assert len(doubles[0].bodies) >= 2 + 2 + 1 + 4
