"""Two gloo ranks, under DistributedDataParallel and FSDP2: the same numbers as unfused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.trl_ranks import KINDS
from tests.helpers.trl_runs import Record, assert_same_run, flat, save

ROOT = Path(__file__).parents[3]


@pytest.mark.dist
def test_two_ranks(tmp_path: Path) -> None:
    save("qwen3", tmp_path / "model")
    command = [sys.executable, "-m", "tests.helpers.trl_ranks", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in (*KINDS, "transformers", "fsdp2"):
        ours = [read(tmp_path, kind, "fused", rank) for rank in range(2)]
        for rank in range(2):
            assert_same_run(ours[rank], read(tmp_path, kind, "plain", rank))
        for left, right in zip(ours[0].grads, ours[1].grads, strict=True):  # of both ranks
            torch.testing.assert_close(flat(left), flat(right), rtol=0, atol=0)


def read(folder: Path, kind: str, name: str, rank: int) -> Record:
    return Record(**torch.load(folder / f"{kind}-{name}-{rank}.pt", weights_only=True))
