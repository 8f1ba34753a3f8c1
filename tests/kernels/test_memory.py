"""Peak extra memory: at most the workspace, the outputs and 32 MiB, each call in a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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


Measure = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def measure() -> Iterator[Measure]:
    """Asks the probe, which is started once: importing torch takes longer than most calls."""
    root = str(PROBE.parents[2])
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        # Every large buffer is mapped and unmapped by itself: glibc would otherwise keep freed
        # ones, which hides a part of the peak or, by fragmentation, adds to it.
        "MALLOC_MMAP_THRESHOLD_": str(MIB),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    with subprocess.Popen([sys.executable, str(PROBE)], env=environment, **pipes) as probe:

        def ask(*case: str, workspace: int = WORKSPACE) -> dict[str, int]:
            probe.stdin.write(" ".join(map(str, [*case, workspace, *SIZES])) + "\n")
            probe.stdin.flush()
            found = json.loads(probe.stdout.readline())
            assert "died" not in found, f"the probe's process ended with status {found['died']}"
            return found

        yield ask
        probe.stdin.close()


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
        ("targets", "input", "none", "bfloat16"),
        ("targets", "head", "none", "float32"),
        ("cross_entropy", "head", "mean", "bfloat16"),
        ("topk", "nothing", "none", "bfloat16"),
        pytest.param("topk", "nothing", "none", "float64", marks=pytest.mark.exhaustive),
        # Heads that are converted to fp32 part by part.
        ("jsd", "input", "none", "float16"),
        ("logprob", "head", "none", "float16"),
    ],
)
def test_peak_memory(op: str, wrt: str, reduction: str, dtype: str, measure: Measure) -> None:
    found = measure(op, wrt, reduction, dtype)
    assert found["planned_workspace"] <= WORKSPACE * MIB
    limit = bound(found)
    assert found["extra"] <= limit, (
        f"{found['extra'] / MIB:.0f} MiB, allowed {limit / MIB:.0f}: {found}"
    )


def test_a_smaller_workspace_takes_less(measure: Measure) -> None:
    found = measure("jsd", "input", "mean", "float32", workspace=8)
    assert found["extra"] <= bound(found, 8)


def test_the_probe_sees_full_logits(measure: Measure) -> None:
    """The measurement would catch an implementation that makes them."""
    found = measure("reference", "input", "mean", "float32")
    assert found["extra"] > bound(found)
