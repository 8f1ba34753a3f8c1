"""The Triton backend on both schedules against float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from opsd_kernels import plan, reference
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import STUDENT, check, workspace_for
from tests.helpers.triton_cases import DTYPES, EACH, KINDS, RULES, SCHEDULES, TRAINED, compare

# fp16 changes the products and what is stored, not the way there.
TYPED = [(*each, torch.float32) for each in EACH] + [(*each, torch.float16) for each in EACH[1::2]]


@TRAINED
@SCHEDULES
@pytest.mark.parametrize(("name", "reduction", "dtype"), TYPED)
def test_accuracy(
    name: str,
    reduction: str | None,
    schedule: str,
    trained: bool,
    dtype: torch.dtype,
    triton_device: str,
) -> None:
    pair = make_pair(20, 24, 101, masked=3)
    compare(name, pair, trained, reduction, dtype, triton_device, schedule=schedule)


# Less than one tile, and one row and column over a tile.
@SCHEDULES
@pytest.mark.parametrize("shape", [(1, 1, 2), (17, 33, 129)])
@pytest.mark.parametrize("name", KINDS)
def test_odd_shapes(
    name: str, shape: tuple[int, int, int], schedule: str, triton_device: str
) -> None:
    pair = make_pair(*shape, seed=2)
    compare(name, pair, True, None, torch.float32, triton_device, schedule=schedule)


@SCHEDULES
@TRAINED
@pytest.mark.parametrize("name", ["jsd 0", "jsd 0.1", "logprob and entropy"])
@pytest.mark.usefixtures("wide_tiles")
def test_several_blocks_of_rows_and_slices(
    name: str, trained: bool, schedule: str, triton_device: str
) -> None:
    sizes = (11, 8, 1100)
    loss = "logprob" if name.startswith("logprob") else "divergence"
    how = {"loss": loss, "device": "cuda", "schedule": schedule, "grad_weight": trained}
    how["entropy_grad"] = loss == "logprob"
    budget = workspace_for(8, *sizes, **how)
    chosen = plan(*sizes, workspace_bytes=budget, **how)
    assert chosen.num_blocks > 1
    assert (chosen.slice_columns < sizes[2]) == (schedule == "streaming")
    pair = make_pair(*sizes, masked=2, seed=3)
    run = {"schedule": schedule, "workspace_bytes": budget}
    compare(name, pair, trained, None, torch.float32, triton_device, **run)


# A pair of heads and a single one, each dtype once.
@pytest.mark.parametrize(
    ("name", "dtype"), [("jsd 0.1", torch.float32), ("cross-entropy", torch.float16)]
)
def test_a_long_sum(name: str, dtype: torch.dtype, triton_device: str) -> None:
    """32 steps of a product's inner size, odd sizes around; test_cuda_risks has a model's."""
    pair = make_pair(9, 517, 67, masked=2, seed=5)
    compare(name, pair, False, "none", dtype, triton_device, schedule="streaming")


@SCHEDULES
@TRAINED
@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_shared_head_on_close_pairs(
    beta: float, dtype: torch.dtype, trained: bool, schedule: str, triton_device: str
) -> None:
    def shared(**p: Tensor) -> Tensor:
        p["teacher_weight"] = p["student_weight"]
        return fused_linear_jsd(**p, schedule=schedule)

    pair = make_pair(20, 24, 101, kind="close", masked=2, seed=4)
    options = {"beta": beta, "reduction": "none", **RULES[dtype]}
    wrt = STUDENT if trained else STUDENT[:1]
    check(shared, reference.linear_jsd, pair, wrt, dtype=dtype, device=triton_device, **options)
