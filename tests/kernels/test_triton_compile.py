"""The Triton kernels compiled for GPUs that are not here, in processes that interpret nothing."""

import json
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
    check("--hot", "--target", "90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "100"])
def test_the_same_for_other_gpus(target: str) -> None:
    """No spills, and shared memory that the device has; the fast tests have sm_90."""
    check("--hot", "--target", target)


@pytest.mark.slow
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


# Keys of Triton's cache of compilations, which Triton itself makes of the launcher's arguments: for
# each question the launches that would compile again. 780 tokens are more than one block.
KEYS = """
import functools, json
from dataclasses import replace
from unittest import mock
from benchmarks.compile import launches as m

@functools.cache
def keys(schedule, **kind):
    kind = m.Kind(**{"tokens": 780, **kind})
    runs = tuple(run for run in m.RUNS if run["schedule"] == schedule)
    return set(m.launches(90, kind, True, runs, scaled=(True, False)))

def ask(question, again):
    answers[question] = sorted(f"{launch.kernel} {launch.aligned}" for launch in again)

answers, whole = {}, m.DivergenceProblem

def warm(head):
    return replace(head, temperature=0.7)

def other(*a):
    beta = 0.3 if a[4] == 0.5 else a[4]
    return whole(*map(warm, a[:2]), *a[2:4], beta, *a[5:])

for schedule in sorted({run["schedule"] for run in m.RUNS}):
    for vocab in (50257, 151936):
        first = keys(schedule, vocab=vocab)
        alone = {replace(launch, aligned=()): launch for launch in first}
        ask(f"{schedule} {vocab}: block or slice", first - set(alone.values()))
        for tokens in (779, 17, 1):
            again = keys(schedule, vocab=vocab, tokens=tokens) - first
            ask(f"{schedule} {vocab}: {tokens} tokens", again)
        again = keys(schedule, vocab=vocab, offset=1) ^ first
        ask(f"{schedule} {vocab}: labels and scales that start elsewhere", again)
    # Rows of logits start at whole vectors whatever the vocabulary; a fused kernel has none.
    one, many = (151936, (128256, 50272, 50259)) if schedule != "streaming" else (50257, (50259,))
    for vocab in many:
        again = keys(schedule, vocab=vocab) ^ keys(schedule, vocab=one)
        ask(f"{schedule}: vocabulary {vocab}", again)
    first = keys(schedule, vocab=50257)
    with mock.patch.object(m, "DivergenceProblem", other):
        again = keys.__wrapped__(schedule, vocab=50257) ^ first
        ask(f"{schedule}: beta and temperature", again)
shared = {launch.constant.get("SHARED") for launch in keys("streaming")}
print(json.dumps({"again": answers, "shared": [True in shared, False in shared]}))
"""


@pytest.fixture(scope="module")
def keys() -> dict[str, object]:
    done = python("-c", KEYS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "change", ["block or slice", "tokens", "start elsewhere", "vocabulary", "beta and temperature"]
)
def test_what_changes_from_call_to_call_does_not_compile_again(
    change: str, keys: dict[str, object]
) -> None:
    asked = {question: again for question, again in keys["again"].items() if change in question}
    assert asked
    assert not any(asked.values()), {question: again for question, again in asked.items() if again}


def test_distinct_heads_are_launched_beside_a_shared_one(keys: dict[str, object]) -> None:
    assert keys["shared"] == [True, True]


# Loads of global memory, barriers and stores in the order of the code, up to the first store.
ORDER = """
import importlib, json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.compile import launches as m

found = {}
for launch in m.launches(90, m.Kind(), hot=True, runs=m.RUNS[:3:2]):
    if not re.fullmatch("row_.*_gradient|row_jsd_shares", launch.kernel):
        continue
    attrs = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attrs)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch.options))
    steps = re.findall(r"ld\\.global|bar\\.sync|barrier\\.sync|st\\.global", made.asm["ptx"])
    found[f"{launch.kernel} {launch.constants}"] = steps[: steps.index("st.global")]
print(json.dumps(found))
"""


def test_a_gradient_in_place_waits_for_the_rows_readers() -> None:
    """A narrower gradient overwrites logits that other threads load: between the last load of a
    step and its store stands a barrier, which no run without a GPU would miss."""
    done = python("-c", ORDER)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = {name.split()[0] for name in found}
    assert kernels == {"row_divergence_gradient", "row_logprob_gradient", "row_jsd_shares"}
    for name, steps in found.items():
        assert steps[-1] != "ld.global" and "ld.global" in steps, (name, steps)


@pytest.mark.parametrize("path", [None, TRITON36], ids=["own", "3.6"])
def test_a_prepared_launch_repeats_the_first(path: Path | None) -> None:
    """By the compiled kernel, with the arguments that Triton's own launcher gave it."""
    if path is not None and not (path / "triton").exists():
        pytest.skip(f"no Triton 3.6 in {path}; the Makefile puts it there")
    done = python("-m", "tests.helpers.prepared_launches", path=path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    first, *again = found["launches"]
    assert len(again) == 2 and found["by_triton"] == 1
    assert [x["stream"] for x in found["launches"]] == [7, 7, 8]
    for launch in again:
        assert {**launch, "stream": 7} == first
    # One block of 5 rows and 3 of 4: each size's 2 passes over 2 slices by Triton once.
    assert found["sizes"] == [5, 4, 4, 4]
    assert (
        found["merges"] == 4 and found["all"] == 4 * 4 + 4 and found["all_by_triton"] == 2 * 4 + 4
    )
