"""Inputs that break kernels, on the Triton backend: infinities, offsets, NaN, nothing to do."""

import pytest
import torch

from opsd_kernels import reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import cast, make_pair
from tests.helpers.kernel_cases import STUDENT, check, move, prepare, run
from tests.helpers.triton_cases import (
    EACH,
    KINDS,
    SCHEDULES,
    TRAINED,
    check_nan_stays_nan,
    compare,
)


# Offsets that overflow exp in either direction without the row's maximum.
@SCHEDULES
@pytest.mark.parametrize("offset", [1e3, -1e3])
@pytest.mark.parametrize("name", KINDS)
def test_offset_logits(name: str, offset: float, schedule: str, triton_device: str) -> None:
    pair = make_pair(20, 24, 101, offset=offset, seed=8)
    compare(name, pair, True, None, torch.float32, triton_device, schedule=schedule)


@SCHEDULES
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_one_hot_rows(beta: float, schedule: str, triton_device: str) -> None:
    pair = make_pair(20, 101, 101, kind="onehot", std=30.0, seed=9)
    rules = {"device": triton_device, "only_ours": {"schedule": schedule}, "max_factor": 4.0}
    options = {"beta": beta, "reduction": "none"}
    check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **rules, **options)


# Who bans decides which terms are infinite; each end of beta has its own formula.
@SCHEDULES
@pytest.mark.parametrize("banned", ["both", "student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_banned_vocabulary(beta: float, banned: str, schedule: str, triton_device: str) -> None:
    pair = make_pair(20, 24, 201, seed=10)
    for who in ("student", "teacher"):
        if banned in ("both", who):  # a whole tile of them first, so that a maximum must wait
            pair[f"{who}_bias"][[*range(70), 133, 200]] = float("-inf")
    options = {"beta": beta, "reduction": "none", "schedule": schedule}
    if (banned, beta) not in {("student", 0.0), ("teacher", 1.0)}:
        rules = {"device": triton_device, "max_factor": 4.0}
        rules["only_ours"] = {"schedule": options.pop("schedule")}
        check(fused_linear_jsd, reference.linear_jsd, pair, STUDENT, **rules, **options)
        return
    there = move(cast(pair, torch.float32), triton_device)
    values, grads = run(fused_linear_jsd, there, STUDENT, **options)
    assert values[0].isposinf().all()
    assert all(grad.isfinite().all() for grad in grads.values())


@SCHEDULES
@pytest.mark.parametrize("name", KINDS)
def test_nan_stays_nan(name: str, schedule: str, triton_device: str) -> None:
    check_nan_stays_nan(name, schedule, triton_device)


@SCHEDULES
@TRAINED
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_all_masked(
    name: str, reduction: str | None, trained: bool, schedule: str, triton_device: str
) -> None:
    pair = move(make_pair(9, 16, 101, masked=9, seed=12, dtype=torch.float32), triton_device)
    loss, inputs, wrt, options = prepare(name, pair, trained, reduction)
    more = {} if name == "policy gradient" else {"schedule": schedule}
    values, grads = run(loss.fn, inputs, wrt, **options, **more)
    assert all((value == 0).all() for value in values)
    for key in wrt:
        assert grads[key].shape == inputs[key].shape and (grads[key] == 0).all(), key
