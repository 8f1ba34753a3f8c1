"""PyTorch's settings of matrix products: tf32 by either of two, and what refuses fp32 sums."""

import subprocess
import sys

import pytest

from opsd_kernels.backends import blocked_torch
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair
from tests.helpers.kernel_cases import STUDENT, run

LEGACY, NEW = "torch.backends.cuda.matmul.allow_tf32", "torch.backends.cuda.matmul.fp32_precision"
GENERIC = "torch.backends.fp32_precision"
SETTINGS = [
    ("pass", False),
    (f"{LEGACY} = True", True),
    (f"{LEGACY} = False", False),
    ("torch.set_float32_matmul_precision('high')", True),
    ("torch.set_float32_matmul_precision('medium')", True),
    ("torch.set_float32_matmul_precision('highest')", False),
    (f"{NEW} = 'tf32'", True),
    (f"{NEW} = 'ieee'", False),
    (f"{GENERIC} = 'tf32'", True),
    (f"{GENERIC} = 'ieee'", False),
    (f"{GENERIC} = 'tf32'; {NEW} = 'ieee'", False),
    (f"{GENERIC} = 'ieee'; {NEW} = 'tf32'", True),
    ("torch.backends.cudnn.fp32_precision = 'tf32'", True),  # writes all of CUDA's
    # Mixed: PyTorch raises where the older one is read.
    (f"{LEGACY} = True; {NEW} = 'ieee'", False),
    (f"{NEW} = 'tf32'; {LEGACY} = False", False),
    (f"{GENERIC} = 'tf32'; torch.set_float32_matmul_precision('highest')", False),
]
ASK = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from opsd_kernels.backends import triton_launch
x = torch.zeros(4, 16)
source = triton_launch.Source(x, x, None, None, 1.0)
for setting in {settings}:
    # As a new process has it: nothing set by either way.
    torch.backends.cuda.matmul.allow_tf32 = False
    for backend in torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul:
        backend.fp32_precision = "none"
    exec(setting)
    print(triton_launch.FusedTiles([source], False).options()["PRECISION"])
"""


@pytest.fixture(scope="module")
def precisions() -> list[str]:
    """What fp32 products are compiled for under each setting, which PyTorch cannot take back."""
    pytest.importorskip("triton")
    code = ASK.format(settings=[setting for setting, _ in SETTINGS])
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.split()


@pytest.mark.parametrize(
    ("index", "allowed"), [(i, allowed) for i, (_, allowed) in enumerate(SETTINGS)],
    ids=[setting for setting, _ in SETTINGS],
)  # fmt: skip
def test_tf32_only_where_allowed(index: int, allowed: bool, precisions: list[str]) -> None:
    assert precisions[index] == ("tf32" if allowed else "ieee")


# The two messages that PyTorch gives; a trained head adds products.
@pytest.mark.parametrize(
    ("refusal", "named"),
    [
        (
            "Tunable GEMM is not supported for float output with reduced float input",
            "torch.cuda.tunable: ",
        ),
        (
            "gemm input type at::Half and output type float is not supported with "
            "allowFP16AccumulationCuBLAS",
            "torch.backends.cuda.matmul.allow_fp16_accumulation: ",
        ),
    ],
)
@pytest.mark.parametrize("wrt", [STUDENT[:1], STUDENT], ids=["frozen", "trained"])
def test_refusals_name_the_setting(
    wrt: tuple[str, ...], refusal: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(refusal)

    monkeypatch.setattr(blocked_torch, "divergence", refuse)
    monkeypatch.setattr("opsd_kernels.extension.serves", lambda device, *dtypes: False)
    with pytest.raises(RuntimeError) as caught:
        run(fused_linear_jsd, make_pair(5, 6, 11), wrt)
    message = str(caught.value)
    assert message.startswith(named) and "\n" not in message


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(blocked_torch, "divergence", fail)
    monkeypatch.setattr("opsd_kernels.extension.serves", lambda device, *dtypes: False)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        fused_linear_jsd(**make_pair(5, 6, 11))
