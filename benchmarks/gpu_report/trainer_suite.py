"""Tests of trainers, methods and integrations on the GPU, with tiny models; CI has the CPU."""

from __future__ import annotations

import importlib.util
import os

from benchmarks.gpu_report import suite
from benchmarks.gpu_report.job import Emit, GpuJob
from benchmarks.gpu_report.work import Absent

_TRAIN, _INTEGRATIONS = "tests/train", "tests/kernels/integrations"
_WHERE = [
    *(f"{_TRAIN}/{name}" for name in ("checkpoint", "methods", "model", "rollout")),
    *(f"{_TRAIN}/test_{name}.py" for name in ("cache_teacher", "family_runs", "trainer")),
    f"{_TRAIN}/config/test_recipes.py",
    f"{_TRAIN}/evaluation/test_evaluate.py",
    f"{_INTEGRATIONS}/test_transformers.py",
]
_FAST = ["-m", "not slow and not exhaustive and not gpu and not vllm"]
_SMALL = [f"{_TRAIN}/methods/test_methods.py", "-k", "opsd and JSD"]
_NEEDED = ("pydantic", "reasoning_gym", "math_verify", "matplotlib", "rich", "jinja2", "yaml")
_NEEDED += ("pyarrow", "tensorboard")


def shards(job: GpuJob) -> list[list[str]]:
    """The tests, dealt to the processes. Raises Absent without the packages that they import."""
    missing = [name for name in _NEEDED if not _installed(name)]
    if missing:
        raise Absent(f"not installed: {', '.join(missing)}")
    trl = [f"{_INTEGRATIONS}/test_trl.py"] if _installed("trl") else []
    return suite.dealt(_SMALL if job.small else [*_WHERE, *trl, *_FAST], job)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def work(ids: list[str], job: GpuJob, emit: Emit) -> None:
    """Run these tests on the job's device."""
    os.environ["OPSD_TEST_DEVICE"] = job.device.type  # tests/helpers/devices.py reads it
    suite.work(ids, job, emit)
