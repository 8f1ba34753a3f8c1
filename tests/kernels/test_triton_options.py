"""Every argument of the losses on both schedules of the Triton backend."""

from collections.abc import Callable

import pytest
import torch

from opsd_kernels import reference
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import make_pair, single
from tests.helpers.compiled import flat
from tests.helpers.kernel_cases import SINGLE, STUDENT, check, move
from tests.helpers.triton_cases import KINDS, SCHEDULES, TRAINED, compare


# The clip adds a statistic; each beta and a trained head compile other branches.
@SCHEDULES
@TRAINED
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 0.02])
def test_every_option_and_statistic(
    clip: float | None, beta: float, trained: bool, schedule: str, triton_device: str
) -> None:
    pair = make_pair(20, 24, 120, teacher_hidden=13, masked=3, seed=5)
    pair["shift_labels"] = pair["shift_labels"].clamp(max=109)
    weight = torch.linspace(0, 2, 20, dtype=torch.float64)
    options = {"token_weight": weight, "num_tokens": torch.tensor(57.0), "return_stats": True}
    options |= {"student_softcap": 9.0, "teacher_softcap": 7.0, "temperature": 1.3}
    options |= {"token_clip": clip, "vocab_size": 110, "beta": beta}

    def flatly(fn: Callable, **more: object) -> Callable:
        return lambda **p: flat(fn(**p, **move(options, p["student_input"].device), **more))

    wrt = STUDENT if trained else STUDENT[:1]
    ours, truth = flatly(fused_linear_jsd, schedule=schedule), flatly(reference.linear_jsd)
    check(ours, truth, pair, wrt, device=triton_device, max_factor=4.0)


@SCHEDULES
@TRAINED
def test_options_of_one_distribution(trained: bool, schedule: str, triton_device: str) -> None:
    inputs = single(make_pair(20, 24, 101, masked=3, seed=6))
    wrt = SINGLE if trained else SINGLE[:1]
    how = {"temperature": 0.7, "softcap": 8.0}
    common = {"device": triton_device, "max_factor": 4.0, "only_ours": {"schedule": schedule}}
    truth = reference.linear_logprob
    check(fused_linear_logprob, truth, inputs, wrt, **common, **how, return_entropy=True)
    weight = torch.linspace(0, 2, 20, dtype=torch.float64)
    how |= {"label_smoothing": 0.2, "token_weight": weight, "num_tokens": 31.0}
    check(fused_linear_cross_entropy, reference.linear_cross_entropy, inputs, wrt, **common, **how)


@SCHEDULES
@pytest.mark.parametrize("name", KINDS)
def test_inputs_of_any_stride(name: str, schedule: str, triton_device: str) -> None:
    pair = make_pair(20, 24, 101, masked=3, seed=7, dtype=torch.float32)
    for key in ("student_input", "student_weight", "teacher_input", "teacher_weight"):
        pair[key] = pair[key].T.contiguous().T
    compare(name, pair, True, None, torch.float32, triton_device, schedule=schedule)
