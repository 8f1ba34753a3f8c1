"""The Triton kernels compiled for GPUs that are not here, in processes that interpret nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_training_runs_compiles_without_spills() -> None:
    done = python("-m", "benchmarks.compile", "--check", "--hot")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_everything_compiles_no_worse_than_the_file_says() -> None:
    done = python("-m", "benchmarks.compile", "--check")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_numbers_of_a_call_do_not_compile_again() -> None:
    """Launches that differ in beta, temperature or tokens alone ask for the same compilations."""
    script = """
import torch
from unittest import mock
from benchmarks.compile import launches as m
first = set(m.launches(90, hot=True))
for tokens in (8191, 1000, 17):
    with mock.patch.object(m, "TOKENS", tokens):
        assert set(m.launches(90, hot=True)) <= first, tokens
whole = m.DivergenceProblem
def other(*a):
    beta = 0.3 if a[4] == 0.5 else a[4]
    return whole(*a[:4], beta, 0.7, *a[6:])
with mock.patch.object(m, "DivergenceProblem", other):
    assert set(m.launches(90, hot=True)) == first
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
