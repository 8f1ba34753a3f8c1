"""Warnings of collapse: when, how often, and not at noise."""

import json
import random

import pytest

from opsd_train.config.schema import CollapseConfig
from opsd_train.reporting.collapse import MONITORED, RECENT, CollapseMonitor

FIRST = [1.0, 1.2, 0.8, 1.0, 1.1, 0.9]  # mean 1, std 0.129: the band is 0.484 to 1.516


# Steps 1 to 30 of the study's sums-long-s0, whose accuracy was 0 later. Mean and standard deviation
# of the first ten are 2.74 and 0.85: 4 deviations below is an entropy of -0.67.
RESTLESS = [
    *(1.21, 2.05, 2.42, 4.13, 3.46, 2.30, 3.81, 2.46, 3.20, 2.37, 1.40, 1.37, 1.54, 1.20, 1.48),
    *(0.79, 1.66, 1.30, 1.23, 1.15, 0.77, 0.52, 0.25, 0.25, 0.26, 0.37, 0.42, 0.22, 0.36, 0.49),
]


def monitor() -> CollapseMonitor:
    return CollapseMonitor(CollapseConfig(first_steps=len(FIRST), width=4.0))


def run(made: CollapseMonitor, name: str, values: list[float], start: int = 1) -> dict[int, str]:
    """Steps with a warning."""
    found = {}
    for step, value in enumerate(values, start):
        for warning in made.observe(step, {name: value, "loss": 100.0 * step}):
            found[step] = warning
    return found


def test_one_line_that_names_everything():
    [(step, line)] = run(monitor(), "student_entropy", FIRST + [0.0] * 12).items()
    assert step == len(FIRST) + 3  # 2 of the last 5 are old: their mean is 0.4
    assert line.startswith(
        "step 9: student_entropy is 0.4 (mean of 5 steps), below the band 0.4836 to 1.516 of its "
        "first 6 steps; "
    )
    assert "optim.lr" in line and "\n" not in line


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("side", ["below", "above"])
def test_sides(name, side):
    found = run(monitor(), name, FIRST + [0.0 if side == "below" else 2.5] * 9)
    assert len(found) == (side in MONITORED[name])
    assert all(side in line and name in line for line in found.values())


def test_every_excursion_warns_once():
    far, back = [3.0] * 8, [1.0] * 8
    found = run(monitor(), "entropy", FIRST + far + back + far)
    assert len(found) == 2
    # At the edge of the band and back into its outer half: still the same excursion.
    edge = [1.55] * 8 + [1.45] * 8
    assert len(run(monitor(), "entropy", FIRST + edge * 3)) == 1


def test_one_outlier_is_no_excursion():
    assert run(monitor(), "completion_length", [100 * v for v in [*FIRST, 1.9, *FIRST, 0.1]]) == {}


def test_a_fall_after_restless_first_steps():
    made = CollapseMonitor(CollapseConfig())
    [(step, line)] = run(made, "student_entropy", RESTLESS + [0.0] * 100).items()
    assert RESTLESS[step - 1] == 0.25
    assert "below the band 0.6852 to 6.12 of its first 10 steps" in line
    healthy = RESTLESS[:10] + [0.3 * 2.741] * 100  # above a quarter
    assert run(CollapseMonitor(CollapseConfig()), "student_entropy", healthy) == {}


@pytest.mark.parametrize("name", [name for name in MONITORED if "below" in MONITORED[name]])
@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3, 0.6, 0.99])
def test_nothing_may_go_to_zero_unseen(name, spread):
    """However far apart the first values are."""
    first = [1 + spread, 1 - spread] * 3
    assert len(run(monitor(), name, first + [0.0] * 9)) == 1


@pytest.mark.parametrize("level", [0.0, 0.02, 5.0])
def test_a_flat_start_does_not_make_noise_a_warning(level):
    rng = random.Random(0)
    noise = [level + rng.gauss(0, 0.05 * level + 1e-3) for _ in range(200)]
    assert run(monitor(), "divergence", [level] * len(FIRST) + noise) == {}
    assert len(run(monitor(), "divergence", [level] * len(FIRST) + [2 * level + 0.1] * RECENT)) == 1


def test_steps_that_train_on_nothing():
    made = monitor()
    shares = [0.5, *[0.0] * 5, 0.25, *[0.0] * 12, 0.5, *[0.0] * 7]
    found = {
        step: warning
        for step, share in enumerate(shares, 1)
        for warning in made.observe(step, {"trained": share, "student_entropy": None})
    }
    assert list(found) == [13, 26]  # after six in a row, once each time
    assert found[13].startswith("step 13: trained is 0 in each of the last 6 steps; no sample")
    assert "\n" not in found[13]
    first, second = monitor(), monitor()
    assert first.observe(1, {"trained": 0.0}) == []
    for step in range(2, 6):
        first.observe(step, {"trained": 0.0})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert len(second.observe(6, {"trained": 0.0})) == 1


def test_nothing_to_judge():
    made = monitor()
    for step in range(1, 40):
        assert made.observe(step, {"entropy": None, "divergence": float("nan")}) == []


@pytest.mark.parametrize("stop", [3, 8, 12])
def test_a_resumed_run_warns_as_the_whole_one_does(stop):
    values = FIRST + [0.0] * 5 + [1.0] * 9 + [4.0] * 9
    expected = run(monitor(), "entropy", values)
    first, second = monitor(), monitor()
    found = run(first, "entropy", values[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found |= run(second, "entropy", values[stop:], stop + 1)
    assert found == expected and len(found) == 2
