"""fused_linear_topk in Triton: both of its schedules, on a device or in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsd_kernels import layouts, plan, reference
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.testing import cast
from tests.helpers.kernel_cases import move, workspace_for
from tests.helpers.topk_cases import check, integer_case, random_case
from tests.helpers.triton_cases import DTYPES

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 301
OPTIONS = {"softcap": 6.0, "temperature": 0.7, "logit_scale": 0.5}


@pytest.fixture(params=["blocked", "tiled"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A schedule; `tiled` with slices of 128 columns, of which the last is narrower."""
    monkeypatch.setattr(layouts, "_SLICES", (128,))
    monkeypatch.setattr(layouts, "_WAVES", ())
    return {"schedule": request.param}


# As many as a slice has, more than that, and all.
@DTYPES
@pytest.mark.parametrize("k", [1, 64, 128, WIDTH])
def test_values(k: int, dtype: torch.dtype, how: dict[str, object], triton_device: str) -> None:
    case = random_case(11, 16, WIDTH)
    check(case, k, dtype, triton_device, how, **OPTIONS)
    check(case, k, dtype, triton_device, how)


@DTYPES
@pytest.mark.parametrize("k", [1, 3, 64, WIDTH])
def test_ties_and_banned_entries(
    k: int, dtype: torch.dtype, how: dict[str, object], triton_device: str
) -> None:
    case = integer_case(7, 8, WIDTH)
    ours = fused_linear_topk(**move(cast(case, dtype), triton_device), k=k, **how)
    true = reference.linear_topk(**case, k=k)
    assert torch.equal(ours[1].cpu(), true[1])
    assert torch.equal(ours[0].isneginf().cpu(), true[0].isneginf())
    check(case, k, dtype, triton_device, how)


def test_several_blocks(how: dict[str, object], triton_device: str) -> None:
    sizes = (11, 8, WIDTH)
    options = {"loss": "topk", "k": 5, "device": "cuda", **how}
    budget = workspace_for(4, *sizes, **options)
    assert plan(*sizes, workspace_bytes=budget, **options).num_blocks > 1
    only_ours = {**how, "workspace_bytes": budget}
    check(random_case(*sizes, seed=1), 5, torch.float32, triton_device, only_ours)


def test_auto_never_streams(triton_device: str) -> None:
    case = move(cast(random_case(9, 8, 90), torch.float32), triton_device)
    with pytest.raises(ValueError, match="schedule: 'streaming'"):
        fused_linear_topk(**case, k=3, schedule="streaming")
    for tokens, budget in ((1, None), (8192, None), (8192, 2**20), (300, 2**22)):
        chosen = plan(
            tokens, 4096, 151936, loss="topk", k=64, device="cuda", workspace_bytes=budget
        )
        assert chosen.schedule in ("blocked", "tiled") and chosen.gemms == 1


def test_nan_leaves_valid_ids(how: dict[str, object], triton_device: str) -> None:
    case = move(cast(random_case(4, 8, WIDTH), torch.float32), triton_device)
    case["input"][2] = torch.nan
    case["weight"][7, 0] = torch.nan
    logprob, ids, lse = fused_linear_topk(**case, k=9, **how)
    assert logprob.isnan().any() and lse.isnan().all()
    assert all(len(set(row)) == 9 and 0 <= min(row) <= max(row) < WIDTH for row in ids.tolist())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from opsd_kernels.backends.triton_rows import row_largest

types = {"z": "*fp32", "least": "*fp32", "equals": "*i64", "out": "*i64"}
types |= {"cols": "i32", "stride": "i32", "k": "i32", "BLOCK_V": "constexpr"}
source = ASTSource(row_largest, types, {(7,): 2048}, {(0,): [["tt.divisibility", 16]]})
for target in (80, 90, 100):
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 8})
    assert "ld.global" in made.asm["ptx"] and made.metadata.shared < 48 * 1024
"""


def test_the_kernel_compiles() -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
