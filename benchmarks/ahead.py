"""What `rollout.ahead` saves: a vLLM server on one core, the trainer on the other.

    make vllm                    # once: the server's environment
    python -m benchmarks.ahead   # about half an hour on 2 cores

demo/opsd with its adapter, without evaluations. Runs with `rollout.ahead` 0 and 1 take turns, and
in each round the other one begins. Of a run the first two steps do not count (nothing was begun
before the first, and both warm up), nor does the last one, in which nothing is begun.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.environment import ROOT, environment
from opsd_train.config.load import config_from, load_recipe
from opsd_train.model.policy import load_tokenizer, unpack
from opsd_train.serving.vllm_client import ServerLost, VllmServer

OUT = Path("runs/benchmarks/ahead.json")
RECIPE = "demo/opsd"
SKIPPED = 2  # steps at the beginning of a run
START = 900  # seconds that a server may take to start
_PACKAGES = ("torch", "transformers", "peft")


@contextmanager
def served(python: Path, folder: Path, core: int) -> Iterator[str]:
    """A server of the recipe's model on one core; the URL, once it answers."""
    config = config_from(load_recipe(RECIPE), [])
    unpack(config.model, load_tokenizer(config.model), torch.bfloat16, folder / "model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    assert config.lora is not None
    options = f"""--model {folder / "model"} --host 127.0.0.1 --port {port} --dtype bfloat16
        --enforce-eager --max-model-len 512 --enable-lora --max-lora-rank {config.lora.rank}
        --logprobs-mode processed_logprobs""".split()
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own |= {"VLLM_CPU_OMP_THREADS_BIND": str(core), "VLLM_LOGGING_LEVEL": "WARNING"}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", *options],
            env=os.environ | own,
            preexec_fn=partial(os.sched_setaffinity, 0, {core}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine is a process of its own
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, VllmServer(url), log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen, server: VllmServer, log: Path) -> None:
    for _ in range(START):
        try:
            server.check_health(1.0)
            return
        except ServerLost:
            if process.poll() is not None:
                break
            time.sleep(1)
    raise SystemExit(f"the server does not start:\n{log.read_text()[-3000:]}")


def train(url: str, folder: Path, ahead: int, steps: int, core: int) -> dict[str, Any]:
    """A run on one core: seconds of the steps that count, and of those the waiting for samples."""
    settings = [f"output_dir={folder}", f"steps={steps}", f"rollout.ahead={ahead}"]
    settings += ["rollout.engine=vllm-server", f"rollout.servers=[{url}]", "evaluation.problems=0"]
    subprocess.run(
        [sys.executable, "-m", "opsd_train", RECIPE, *settings, "checkpoint.every=0"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=partial(os.sched_setaffinity, 0, {core}),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][SKIPPED:-1]
    assert all(row.get("sample_age", 0) == ahead for row in rows)
    return {
        "ahead": ahead,
        "seconds": [row["seconds"] for row in rows],
        "rollout": [row["seconds_rollout"] for row in rows],
        "loss_tokens": [row["loss_tokens"] for row in rows],
        "sampler_kl": [row["sampler_kl"] for row in rows],
    }


def measure(url: str, folder: Path, rounds: int, steps: int, core: int) -> list[dict[str, Any]]:
    """A row a run."""
    rows = []
    for number in range(rounds):
        for ahead in (0, 1) if number % 2 == 0 else (1, 0):
            rows.append(train(url, folder / f"{number}-{ahead}", ahead, steps, core))
            print(line(rows[-1]), flush=True)
    return rows


def _vllm_version(python: Path) -> str:
    """Of the server's environment, which is not this one."""
    code = "import importlib.metadata as m; print(*(d.version for d in m.distributions()"
    code += " if d.name in ('vllm', 'vllm-cpu')))"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def line(row: dict[str, Any]) -> str:
    """A run as a line of the terminal."""
    step, rollout = median(row["seconds"]), median(row["rollout"])
    return f"rollout.ahead={row['ahead']}  {step:.2f} s a step, {rollout:.2f} s of it for samples"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.ahead", description=__doc__)
    python = ROOT / ".venv-vllm" / "bin" / "python"
    parser.add_argument("--vllm", type=Path, default=python, help=f"a Python with vLLM ({python})")
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1), help="trainer's, server's")
    parser.add_argument("--steps", type=int, default=9, help="of a run (9)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (2)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures as JSON ({OUT})")
    options = parser.parse_args()
    if not options.vllm.exists():
        raise SystemExit(f"no {options.vllm}: run make vllm")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    trainer, server = options.cores
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with served(options.vllm, folder, server) as url:
            rows = measure(url, folder, options.rounds, options.steps, trainer)
    place = environment(packages=_PACKAGES)
    place["versions"]["vllm"] = _vllm_version(options.vllm)
    result = {
        "kind": "ahead",
        "environment": place,
        "settings": {"recipe": RECIPE, "steps": options.steps, "rounds": options.rounds},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    without, ahead = (
        median(s for row in rows if row["ahead"] == value for s in row["seconds"])
        for value in (0, 1)
    )
    print(f"\na step takes {without:.2f} s, with rollout.ahead=1 {ahead:.2f} s", end=": ")
    print(f"{without / ahead:.2f}x as fast\nwritten to {options.out}")


if __name__ == "__main__":
    main()
