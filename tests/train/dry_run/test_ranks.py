"""Predictions for N ranks: what the ranks share, and 1, 2 and 4 real ranks on this CPU."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import resident
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from
from opsd_train.dry_run.devices import DEVICES, Device, Protocol
from opsd_train.dry_run.largest_step import plan_step
from opsd_train.dry_run.plan import dry_run
from opsd_train.dry_run.prediction import peak, predict_run
from tests.helpers import tiny
from tests.helpers.pair import _free_port
from tests.helpers.phase_peaks import ALL_LINEAR

ROOT = Path(__file__).parents[3]
STEPS = 3
PHASES = ("rollout", "teacher", "student", "optimizer")
SMALL_MAPS = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
# Freed memory is kept, as CUDA's allocator does: on this CPU a page mapped anew costs more than
# what is computed on it.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}


def recipe(folder: Path, problems: int = 8, tokens: int = 600) -> dict[str, Any]:
    """OPSD with LoRA on sequences of the same length; a step of `problems`, `tokens` at once."""
    data = folder / "data.jsonl"
    rows = ({"question": f"{i:098d}", "answer": "1", "solution": "y" * 20} for i in range(80))
    data.write_text("\n".join(map(json.dumps, rows)))
    base = tiny.recipe(folder / "model", folder / "run")
    columns = {name: name for name in ("question", "answer", "solution")}
    return base | {
        "problems_per_step": problems,
        "micro_batch_tokens": tokens,
        "lora": base["lora"] | {"rank": 32, "target_modules": ALL_LINEAR},
        "data": {"source": "file", "path": str(data), "columns": columns, "train_size": 64,
                 "heldout_size": 2},
        "prompts": {"student": "{{ problem.question }}", "max_prompt_tokens": 400,
                    "teacher": "{{ problem.question }} {{ problem.solution }}"},
        "rollout": {"max_new_tokens": 8, "batch_tokens": 4000},
        "evaluation": {"problems": 0, "max_new_tokens": 5},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model")
    return tmp_path


def test_the_samples_are_dealt_as_in_training(folder: Path) -> None:
    made = config_from(recipe(folder, 10), [])
    step = plan_step(made, 4)
    loss_tokens = [rank.all_loss_tokens for rank in step.ranks]
    assert sorted(loss_tokens) == [16, 16, 24, 24] and step.loss_tokens == 80
    sizes = {(batch.student.count, batch.student.width) for batch in step.micro_batches}
    width = 98 + 3 + 8  # with the marks of the chat
    assert {w for _, w in sizes} == {width} and sum(n for n, _ in sizes) == 3
    assert [(b.rows, b.new) for b in step.generations] == [(3, 8)]


def test_ranks_share_the_weights_and_the_work(folder: Path) -> None:
    made = config_from(recipe(folder, 16), [])
    one, two = (predict_run(made, ranks=n, device=DEVICES["h100"]) for n in (1, 2))
    assert len(two.memory) == 2 and peak(two.most) < peak(one.most)
    part = "frozen weights"
    assert two.most["student"].parts[part] == one.most["student"].parts[part] // 2
    assert len(two.step.micro_batches) == len(one.step.micro_batches) / 2
    assert two.seconds["student"].communication > one.seconds["student"].communication == 0
    replicas = predict_run(made, "none", 2, DEVICES["h100"])
    assert replicas.most["student"].parts[part] == one.most["student"].parts[part]


def test_more_ranks_than_samples_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="gives 8 samples, fewer than the 9 processes; raise it"):
        dry_run(config_from(recipe(folder), []), ranks=9)


def test_what_it_prints(folder: Path) -> None:
    text = dry_run(config_from(recipe(folder), []), ranks=8, device="h100")
    for part in (
        "memory expected on H100 SXM by each of 8 ranks",
        "  fits: 0.0 of 79.2 GiB",
        "time predicted for a step on 8 x H100 SXM, 1 micro-batch each, without Python",
        "waits for communication",
        "completion tokens/s",
    ):
        assert part in text
    for phase in ("rollout", "teacher", "student", "optimizer"):
        assert f"\n  {phase:12}" in text
    assert "time predicted" not in dry_run(config_from(recipe(folder), []), ranks=8)


def test_what_does_not_fit(folder: Path) -> None:
    shape = Qwen3Config(
        vocab_size=261, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    (folder / "model" / "config.json").unlink()
    shape.save_pretrained(folder / "model")
    urls = "rollout.servers=[http://a:8000]"  # the transformers engine would gather it all
    made = config_from(recipe(folder), ["rollout.engine=vllm-server", urls])  # float32
    assert "\n  does not fit: " in dry_run(made, ranks=2, device="a100")
    assert "\n  fits: " in dry_run(made, ranks=8, device="a100")


# ------------------------------------------------------------------------------------- real ranks


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose products take most of a step."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.save_model(folder / "model")
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).save_pretrained(folder / "model")
    return folder


def large(folder: Path) -> dict[str, Any]:
    """A step in which Python, which is not predicted, takes little of the time of four ranks."""
    return recipe(folder, 32, 1200)


def start(
    what: str, folder: Path, ranks: int, steps: int, environment: dict[str, str]
) -> list[dict]:
    """What each of `ranks` processes found; see tests/helpers/rank_steps.py."""
    script = str(ROOT / "tests" / "helpers" / "rank_steps.py")
    command = [sys.executable, script, what, json.dumps(large(folder)), "[]", str(folder)]
    common = os.environ | resident.WORKER_ENV | environment | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [*command, str(steps)], env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(ranks)
    ]
    assert [process.wait() for process in started] == [0] * ranks
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def cpu(found: list[dict], step: int) -> Device:
    """This machine's CPU as the ranks found it around a step."""
    rates = {
        name: statistics.mean(rank["rates"][step][name] for rank in found)
        for name in found[0]["rates"][step]
    }
    link, scatter = (rates.get(name, 1.0) for name in ("link", "scatter"))
    return Device(
        name="CPU",
        memory=1.0,
        products={4: rates["products"]},
        attention={4: rates["attention"]},
        bandwidth=rates["bandwidth"],
        link=link,
        network=1.0,
        node=len(found),
        protocols=(Protocol(1.0, 0.0, 0.0, 0.0),),
        kind="cpu",
        overlaps=False,
        thin_products=rates["thin"] / rates["bandwidth"],
        reduction=link / scatter,
    )


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_seconds_of_real_ranks(real: Path, ranks: int) -> None:
    """Wall-clock time. The optimizer, mostly Python in a model this small, counts in the step."""
    found = start("seconds", real, ranks, STEPS, KEPT)
    made = config_from(large(real), [])
    ratios: dict[str, list[float]] = {}
    for step in range(STEPS):
        predicted = predict_run(made, "full", ranks, cpu(found, step)).seconds
        measured = {n: statistics.mean(rank["seconds"][step][n] for rank in found) for n in PHASES}
        for name in ("rollout", "teacher", "student"):
            ratios.setdefault(name, []).append(measured[name] / predicted[name].total)
        whole = sum(seconds.total for seconds in predicted.values())
        ratios.setdefault("step", []).append(sum(measured.values()) / whole)
    medians = {name: statistics.median(each) for name, each in ratios.items()}
    print(f"measured over predicted, {ranks} ranks: {medians}")
    assert medians == pytest.approx(dict.fromkeys(medians, 1.0), rel=0.2), ratios


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_peaks_of_real_ranks(real: Path, ranks: int) -> None:
    if reason := resident.why_not():
        pytest.skip(reason)
    found = start("peaks", real, ranks, 1, SMALL_MAPS)
    predicted = predict_run(config_from(large(real), []), "full", ranks).memory
    for rank, phases in zip(found, predicted, strict=True):
        wanted = {name: phase.total for name, phase in phases.items() if name in PHASES}
        assert wanted.keys() == set(PHASES)
        assert {name: rank[name] for name in wanted} == pytest.approx(wanted, rel=0.2)
