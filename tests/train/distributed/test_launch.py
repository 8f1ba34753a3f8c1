"""Runs started by torchrun."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_nodes(*command: str) -> list[subprocess.Popen]:
    """Two agents of torchrun with a rank each, as on two machines."""
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *where]
    return [
        subprocess.Popen(
            [sys.executable, *launch, *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]


def kill(node: subprocess.Popen) -> None:
    """End an agent and its rank at once, as a machine that loses power does."""
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(node.pid)
        for process in [*agent.children(recursive=True), agent]:
            process.kill()
    node.wait()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


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


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_single_process_makes_its_gpu_the_current_one(name: str, monkeypatch) -> None:
    """Else the random state in checkpoints is that of another GPU."""
    made: list[torch.device] = []
    gpu = torch.device("cuda", 1 if name == "cuda:1" else 0)
    monkeypatch.setattr("opsd_train.distributed.context.resolve_device", lambda *_: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    assert init_distributed(name).device == gpu and made == [gpu]


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


@pytest.mark.slow
def test_two_nodes(models: Path, tmp_path: Path) -> None:
    """The losses of one node with two ranks, also after one of the two was killed and resumed."""
    recipe_file = write_recipe(models, tmp_path)
    course = ("-m", "opsd_train", recipe_file, "steps=12", "checkpoint.every=1")
    one = tmp_path / "one"
    assert torchrun(2, *course, f"output_dir={one}").returncode == 0

    run = tmp_path / "two"
    nodes = start_nodes(*course, f"output_dir={run}")
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes)
        time.sleep(0.05)
    kill(nodes[1])
    try:
        assert nodes[0].wait(timeout=120) != 0
    finally:
        kill(nodes[0])
    assert len(losses(run)) < 12

    nodes = start_nodes(*course, f"output_dir={run}", "--resume")
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    assert losses(run) == losses(one)
