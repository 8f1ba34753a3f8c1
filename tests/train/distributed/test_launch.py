"""Runs started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed

from opsd_train.distributed.context import DistributedContext, init_distributed
from tests.helpers.tiny import recipe

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[3]
FAILING = """
import os, sys
from opsd_train.cli import main
from opsd_train.config.errors import UserError
from opsd_train.trainer import Trainer

step = Trainer.step

def failing(self, number):
    if number == 2 and os.environ["RANK"] == "1":
        raise UserError("rank 1 cannot go on")
    return step(self, number)

Trainer.step = failing
sys.exit(main())
"""


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launch, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_recipe(models: Path, folder: Path) -> str:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe(models / "tied", folder / "run")))
    return str(folder / "tiny.yaml")


def test_one_rank_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    context = init_distributed("cpu")
    assert (
        context == DistributedContext(torch.device("cpu"), 0, 1)
        and not distributed.is_initialized()
    )
    assert context.all_gather("a") == context.gather("a") == ["a"] and context.broadcast("a") == "a"
    assert context.sum(2.5) == context.max(2.5) == 2.5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_run(models: Path, tmp_path: Path, ranks: int) -> None:
    made = torchrun(ranks, "-m", "opsd_train", write_recipe(models, tmp_path))
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("run folder") == 1  # only one rank prints
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 3
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(models: Path, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    made = torchrun(2, str(tmp_path / "failing.py"), write_recipe(models, tmp_path))
    assert made.returncode != 0 and "rank 1 cannot go on" in made.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 1
