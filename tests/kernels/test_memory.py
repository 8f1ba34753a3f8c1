"""Peak extra memory: at most the workspace, the outputs and 32 MiB, in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
SLACK = 32 * MIB
WORKSPACE = 48
SIZES = (768, 192, 32768)
PROBE = Path(__file__).parents[1] / "helpers" / "memory_probe.py"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs"
)


def measure(
    op: str, wrt: str, reduction: str, dtype: str, workspace: int = WORKSPACE
) -> dict[str, int]:
    root = str(PROBE.parents[2])
    arguments = [op, wrt, reduction, dtype, workspace, *SIZES]
    done = subprocess.run(
        [sys.executable, str(PROBE), *map(str, arguments)],
        env={
            **os.environ,
            "OMP_WAIT_POLICY": "PASSIVE",
            # Every large buffer is mapped and unmapped by itself: glibc would otherwise keep freed
            # ones, which hides a part of the peak or, by fragmentation, adds to it.
            "MALLOC_MMAP_THRESHOLD_": str(MIB),
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def bound(found: dict[str, int], workspace: int = WORKSPACE) -> int:
    return workspace * MIB + found["outputs"] + SLACK


@pytest.mark.parametrize(
    ("op", "wrt", "reduction", "dtype"),
    [
        ("jsd", "nothing", "mean", "bfloat16"),
        ("jsd", "input", "none", "float32"),
        ("jsd", "input", "mean", "bfloat16"),
        ("jsd", "head", "mean", "float32"),
        pytest.param("jsd", "head", "none", "bfloat16", marks=pytest.mark.exhaustive),
        ("shared", "input", "mean", "bfloat16"),
        ("padded", "head", "mean", "float32"),
        ("logprob", "head", "none", "float32"),
        ("cross_entropy", "head", "mean", "bfloat16"),
        # PyTorch's backend, which converts the heads to fp32.
        ("jsd", "input", "none", "float16"),
        pytest.param("logprob", "head", "none", "float16", marks=pytest.mark.exhaustive),
    ],
)
def test_peak_memory(op: str, wrt: str, reduction: str, dtype: str) -> None:
    found = measure(op, wrt, reduction, dtype)
    assert found["planned_workspace"] <= WORKSPACE * MIB
    limit = bound(found)
    assert found["extra"] <= limit, (
        f"{found['extra'] / MIB:.0f} MiB, allowed {limit / MIB:.0f}: {found}"
    )


def test_a_smaller_workspace_takes_less() -> None:
    found = measure("jsd", "input", "mean", "float32", workspace=8)
    assert found["extra"] <= bound(found, 8)


def test_the_probe_sees_full_logits() -> None:
    """The measurement would catch an implementation that makes them."""
    found = measure("reference", "input", "mean", "float32")
    assert found["extra"] > bound(found)
