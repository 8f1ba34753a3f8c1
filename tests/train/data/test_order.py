"""The problems of a step: shuffled passes over all of them, or draws near a success rate."""

import json
import math
from collections import Counter

import pytest

from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import CurriculumConfig
from opsd_train.data.order import FLOOR, Curriculum, Shuffled, make_order
from opsd_train.data.problems import Problem
from opsd_train.data.seeds import stable_seed


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{index}", f"q{index}", "1", "1") for index in range(count)]


def curriculum(count: int, size: int, seed: int = 0, **changes) -> Curriculum:
    return Curriculum(problems(count), size, seed, CurriculumConfig(**changes))


def ids(drawn: list[Problem]) -> list[str]:
    return [problem.id for problem in drawn]


def test_seeds_do_not_depend_on_the_process():
    assert stable_seed(0, "rollout", 1) == 3460020679
    assert stable_seed(0, "rollout", 2) != stable_seed(0, "rollout", 1)


def test_every_problem_once_a_pass():
    sampler = Shuffled(problems(10), 4, seed=3)
    steps = [ids(sampler.draw(step)) for step in range(1, 16)]
    assert all(len(step) == 4 for step in steps)
    drawn = [name for step in steps for name in step]
    passes = [drawn[first : first + 10] for first in range(0, 60, 10)]
    assert all(sorted(one) == sorted(ids(problems(10))) for one in passes)
    assert len({tuple(one) for one in passes}) == 6  # each in a new order
    other = Shuffled(problems(10), 10, seed=4)
    assert ids(other.draw(1)) != passes[0]


def test_a_step_larger_than_the_problems():
    sampler = Shuffled(problems(3), 7, seed=0)
    assert sorted(Counter(ids(sampler.draw(1))).values()) == [2, 2, 3]
    assert sorted(Counter(ids(curriculum(3, 7).draw(1))).values()) == [2, 2, 3]


@pytest.mark.parametrize("make", [lambda: Shuffled(problems(7), 3, 5), lambda: curriculum(7, 3, 5)])
def test_resumes_exactly(make):
    def advance(sampler, step):
        drawn = ids(sampler.draw(step))
        sampler.observe([(name, int(name[1]) < 3) for name in drawn])
        return drawn

    whole, first, second = make(), make(), make()
    expected = [advance(whole, step) for step in range(1, 13)]
    assert [advance(first, step) for step in range(1, 6)] == expected[:5]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [advance(second, step) for step in range(6, 13)] == expected[5:]


def test_frequencies_are_those_of_the_weights():
    sampler = curriculum(4, size=2, target=0.5, width=0.25)
    sampler.rates, sampler.overall = {"p0": 0.0, "p1": 0.25, "p2": 0.5}, 0.9
    bell = [math.exp(-(((rate - 0.5) / 0.25) ** 2) / 2) for rate in (0.0, 0.25, 0.5, 0.9)]
    weights = [FLOOR + (1 - FLOOR) * value for value in bell]
    assert sampler.weights() == pytest.approx(weights)
    share = [weight / sum(weights) for weight in weights]
    drawn = [ids(sampler.draw(step)) for step in range(20000)]
    firsts = Counter(first for first, _ in drawn)
    within = Counter(name for pair in drawn for name in pair)
    for index, p in enumerate(share):
        others = [q for other, q in enumerate(share) if other != index]
        among_two = p + sum(q * p / (1 - q) for q in others)
        assert firsts[f"p{index}"] / 20000 == pytest.approx(p, abs=0.015)
        assert within[f"p{index}"] / 20000 == pytest.approx(among_two, abs=0.015)


def test_all_alike_before_any_result():
    weights = curriculum(5, 2, target=0.3).weights()
    assert weights == pytest.approx([1.0] * 5)


def test_prefers_the_middle_once_it_knows_the_problems():
    # Thirds: always right, right every other time, never right.
    sampler = curriculum(30, 6)
    answers = Counter()
    drawn = []
    for step in range(1, 301):
        drawn.append([int(name[1:]) % 3 for name in ids(sampler.draw(step))])
        results = []
        for problem in sampler.draw(step):
            kind = int(problem.id[1:]) % 3
            answers[problem.id] += 1
            results.append((problem.id, kind == 0 or (kind == 1 and answers[problem.id] % 2 == 0)))
        sampler.observe(results)
    kinds = Counter(kind for step in drawn[-100:] for kind in step)
    assert kinds[1] > 2.5 * max(kinds[0], kinds[2])
    assert min(kinds[0], kinds[2]) > 0  # the floor keeps every problem in play
    assert sampler.rates["p0"] > 0.95 and sampler.rates["p2"] < 0.05


def test_rates_and_the_overall_rate():
    sampler = curriculum(4, 2, memory=0.75)
    sampler.observe([("p0", True), ("p0", True), ("p1", True), ("p1", False)])
    assert sampler.overall == 0.75  # the first results alone
    assert sampler.rates == pytest.approx({"p0": 0.75 * 0.75 + 0.25, "p1": 0.75 * 0.75 + 0.125})
    sampler.observe([("p1", False)])
    assert sampler.overall == pytest.approx(0.5625)
    assert sampler.rates["p1"] == pytest.approx(0.75 * 0.6875)
    # p2 and p3 were never tried: their weight is that of the overall rate.
    sampler.rates["p2"] = sampler.overall
    weights = sampler.weights()
    assert weights[2] == weights[3] and weights[0] != weights[3]
    sampler.observe([])
    assert sampler.overall == pytest.approx(0.5625)


def test_the_floor():
    sampler = curriculum(2, 1, target=0.9, width=0.05)
    sampler.rates = {"p0": 0.0, "p1": 0.9}
    assert sampler.weights() == pytest.approx([FLOOR, 1.0])


def test_the_recipe_decides():
    recipe = load_recipe("demo/opsd")
    plain = make_order(config_from(recipe, ["problems_per_step=4"]), problems(9))
    assert isinstance(plain, Shuffled) and len(plain.draw(1)) == 4
    drawn = make_order(config_from(recipe, ["curriculum={target: 0.3}"]), problems(9))
    assert isinstance(drawn, Curriculum) and drawn.config.target == 0.3
