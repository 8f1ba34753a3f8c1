"""The Triton kernels compiled for GPUs that are not here, in processes that interpret nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The Triton of torch 2.10 and 2.11, put there by the Makefile beside the environment's own.
TRITON36 = Path(sys.prefix) / "triton36"


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def check(*arguments: str, path: Path | None = None) -> None:
    done = python("-m", "benchmarks.compile", "--check", *arguments, path=path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_what_training_runs_keeps_below_the_ceilings() -> None:
    """No spills, instructions a pair and width of accesses as ceilings.toml says, wgmma."""
    check("--hot")


def test_the_same_with_triton_36() -> None:
    if not (TRITON36 / "triton").exists():
        pytest.skip(f"no Triton 3.6 in {TRITON36}; the Makefile puts it there")
    name = "import triton; print(triton.__version__)"
    assert python("-c", name, path=TRITON36).stdout.strip() == "3.6.0"
    file = "benchmarks/results/compile_triton36.json"
    check("--hot", "--target", "90", "--file", file, path=TRITON36)


@pytest.mark.slow
def test_everything_compiles_no_worse_than_the_file_says() -> None:
    check()


# Keys of Triton's cache of compilations, by schedule and kind of inputs; Triton itself makes them
# of the launcher's arguments.
KEYS = """
from dataclasses import replace
from unittest import mock
from benchmarks.compile import launches as m

def keys(schedule, **kind):
    kind = m.Kind(**{"tokens": 3000, **kind})
    runs = tuple(run for run in m.RUNS if run["schedule"] == schedule)
    return set(m.launches(90, kind, True, runs, scaled=(True, False)))
"""


def holds(script: str) -> None:
    done = python("-c", KEYS + script)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("schedule", ["blocked", "streaming"])
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_another_number_of_tokens_does_not_compile_again(vocab: int, schedule: str) -> None:
    """Nor does a block or a slice of one call: no two of its launches differ in alignment alone."""
    holds(f"""
first = keys({schedule!r}, vocab={vocab})
assert len(first) == len({{replace(launch, aligned=()) for launch in first}})
for tokens in (2999, 1000, 17, 1):
    assert keys({schedule!r}, vocab={vocab}, tokens=tokens) <= first, tokens
assert keys({schedule!r}, vocab={vocab}, offset=1) == first, "views of labels and scales"
""")


def test_another_vocabulary_does_not_compile_again() -> None:
    """Rows of logits start at whole vectors whatever their length; rows of a head always do."""
    holds("""
first = keys("blocked", vocab=151936)
for vocab in (128256, 50272, 50257, 50259):
    assert keys("blocked", vocab=vocab) == first, vocab
assert keys("streaming", vocab=128256) == keys("streaming", vocab=151936)
assert keys("streaming", vocab=50257) == keys("streaming", vocab=50259)
""")


@pytest.mark.parametrize("schedule", ["blocked", "streaming"])
def test_numbers_of_a_call_do_not_compile_again(schedule: str) -> None:
    holds(f"""
first, whole = keys({schedule!r}), m.DivergenceProblem
def other(*a):
    beta = 0.3 if a[4] == 0.5 else a[4]
    return whole(*a[:4], beta, 0.7, *a[6:])
with mock.patch.object(m, "DivergenceProblem", other):
    assert keys({schedule!r}) == first
""")


def test_distinct_heads_are_launched_beside_a_shared_one() -> None:
    holds("""
shared = {launch.constant.get("SHARED") for launch in keys("streaming")}
assert shared == {True, False, None}, shared
""")
