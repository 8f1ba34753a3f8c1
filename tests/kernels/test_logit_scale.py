"""A head's logit scale: z = softcap(scale (h W^T + b)) / temperature, each head with its own.

Scales of 1/16, 1/8 and 4 are what Granite, Cohere and Falcon-H1 have; 1 is the default.
"""

import pytest
import torch

from opsd_kernels import reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair, single
from tests.helpers.kernel_cases import LOSSES, STUDENT, check, prepare, run, same_bits

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


# Every loss folds the scale into its own softcap and temperature.
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


@pytest.mark.usefixtures("cpu_backend")
def test_a_scale_is_a_head_multiplied_by_hand() -> None:
    """By a power of two nothing is rounded otherwise."""
    pair = make_pair(20, 24, 131, masked=3, seed=6, dtype=torch.float32)
    by_hand = dict(pair)
    for who, scale in (("student", 4.0), ("teacher", 0.0625)):
        for part in ("weight", "bias"):
            by_hand[f"{who}_{part}"] = scale * pair[f"{who}_{part}"]
    how = {"student_softcap": 30.0, "teacher_softcap": 30.0}
    scales = {"student_logit_scale": 4.0, "teacher_logit_scale": 0.0625}
    ours, ours_grads = run(fused_linear_jsd, pair, STUDENT, **how, **scales)
    expected, expected_grads = run(fused_linear_jsd, by_hand, STUDENT, **how)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours_grads["student_input"], expected_grads["student_input"])
    for name in STUDENT[1:]:
        torch.testing.assert_close(ours_grads[name], 4.0 * expected_grads[name])


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", ["jsd 0.5", "logprob and entropy"])
def test_a_scale_of_one_changes_no_bit(name: str) -> None:
    loss, inputs, wrt, options = prepare(name, make_pair(20, 24, 131, seed=7), True, None)
    scales = {k: 1.0 for k in options_of(name, CASES[0]) if k.endswith("scale")}
    plain = run(loss.fn, inputs, wrt, **options)
    same_bits(run(loss.fn, inputs, wrt, **options, **scales), plain)


@pytest.mark.usefixtures("cpu_backend")
def test_statistics_are_those_of_the_scaled_logits() -> None:
    pair = make_pair(20, 24, 131, masked=3, seed=8)
    how = {**options_of("jsd 0.5", CASES[1]), "token_clip": 0.05, "return_stats": True}
    _, ours = fused_linear_jsd(**pair, **how)
    _, truth = reference.linear_jsd(**pair, **how)
    assert ours.keys() == truth.keys()
    for name, column in truth.items():
        torch.testing.assert_close(ours[name].double(), column, rtol=1e-5, atol=1e-6)


def test_half_precision(cpu_backend: str) -> None:
    """Gradients of scaled logits in the dtypes of training: a factor is applied in fp32."""
    for name, dtype in (("jsd 0.5", torch.bfloat16), ("cross-entropy", torch.float16)):
        loss, inputs, wrt, options = prepare(name, make_pair(20, 24, 131, seed=9), True, None)
        how = {"dtype": dtype, "max_factor": 4.0}
        check(loss.fn, loss.truth, inputs, wrt, **how, **options, **options_of(name, CASES[1]))
