"""A head's logit scale: z = softcap(scale (h W^T + b)) / temperature, each head with its own.

Scales of 1/16, 1/8 and 4 are what Granite, Cohere and Falcon-H1 have; 1 is the default.
"""

import pytest
from kernel_cases import LOSSES, check, prepare

from opsd_kernels.testing import make_pair, single

# (student's scale, teacher's, softcap, bias, trained head): each value beside each other once.
CASES = [
    (4.0, 0.0625, None, True, True),
    (0.0625, 4.0, 30.0, True, False),
    (0.125, 1.0, 30.0, False, True),
    (1.0, 0.125, None, False, False),
]
IDS = [f"{s}-{t}" for s, t, *_ in CASES]


def options_of(name: str, case: tuple) -> dict[str, object]:
    student, teacher, cap, _, _ = case
    if LOSSES[name].inputs is single:
        return {"logit_scale": student, "softcap": cap, "temperature": 1.3}
    scales = {"student_logit_scale": student, "teacher_logit_scale": teacher}
    return {**scales, "student_softcap": cap, "teacher_softcap": cap, "temperature": 1.3}


def compare(name: str, case: tuple, device: str = "cpu", **only_ours: object) -> None:
    pair = make_pair(20, 24, 131, masked=3, seed=5)
    loss, inputs, wrt, options = prepare(name, pair, case[4], None)
    if not case[3]:
        inputs = {k: v for k, v in inputs.items() if not k.endswith("bias")}
        wrt = tuple(k for k in wrt if k in inputs)
    how = {"device": device, "max_factor": 4.0, "only_ours": only_ours}
    check(loss.fn, loss.truth, inputs, wrt, **how, **options, **options_of(name, case))


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str, case: tuple) -> None:
    compare(name, case)


@pytest.mark.parametrize(
    ("name", "case", "how"),
    [
        ("jsd 0.5", CASES[0], {"schedule": "blocked"}),
        ("forward kl", CASES[1], {"schedule": "blocked"}),
        ("cross-entropy", CASES[2], {"schedule": "blocked"}),
        ("logprob and entropy", CASES[1], {"schedule": "blocked"}),
        ("jsd 0.5", CASES[1], {"schedule": "streaming"}),
        ("reverse kl", CASES[0], {"schedule": "streaming"}),
        ("logprob and entropy", CASES[2], {"schedule": "streaming"}),
        ("jsd 0.5", CASES[1], {"schedule": "tiled"}),  # frozen: sums and gradient joined
        ("reverse kl", CASES[0], {"schedule": "tiled"}),
        ("policy gradient", CASES[1], {}),
    ],
)
def test_triton(name: str, case: tuple, how: dict[str, object], triton_device: str) -> None:
    compare(name, case, triton_device, **how)
