"""`pytest benchmarks --benchmark`: every loss against its peers and the floor.

Without the flag every contender is run once at a tiny size, and its answer compared with the truth:
a registry that calls a peer with the wrong sign of beta would compare different things.
"""

from __future__ import annotations

import pytest

from benchmarks.losses.inputs import MissingInputs
from benchmarks.losses.runner import measure

# What 16 bits leave of the tiny cases' losses and gradients, for anybody; fp32 is exact beside it.
_TOLERANCE = {"bfloat16": 0.08, "float16": 0.01, "float32": 1e-4}


def test_loss(case, device, memory, record, with_compiled, request) -> None:
    measuring = request.config.option.benchmark
    drive = None
    if measuring and request.config.pluginmanager.hasplugin("benchmark"):
        drive = request.getfixturevalue("benchmark").pedantic
    try:
        found = measure(
            case, device, memory,
            budget=3.0 if measuring else 0.0, compiled=with_compiled, drive=drive,
        )  # fmt: skip
    except MissingInputs as error:
        record.skip(case.id, str(error))
        pytest.skip(str(error))
    record.cases.append(found)
    if not measuring:
        for name, contender in found["contenders"].items():
            for what, error in contender.get("error", {}).items():
                assert error is None or abs(error) < _TOLERANCE[case.dtype], (name, what, error)
