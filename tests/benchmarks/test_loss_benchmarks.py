"""The loss benchmarks themselves: what they would miss, and what they say of who is absent."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.losses import cases, runner
from benchmarks.losses.cases import SMOLLM2, TINY, Case
from benchmarks.losses.contenders import FLOOR, OURS, Contender, contenders
from benchmarks.losses.inputs import Inputs, MissingInputs
from benchmarks.losses.memory import NoMemory, ProcessMemory
from benchmarks.report.tables import suspicious

CPU = torch.device("cpu")
CASE = Case("jsd", "trained", "float32", TINY, 48)


def measured(monkeypatch, *extra: Contender, case: Case = CASE, patience: float = 9.0) -> dict:
    """One case with further contenders at the end."""
    everyone = [c for c in contenders(case, CPU) if c.role != "peer"] + list(extra)
    monkeypatch.setattr(runner, "contenders", lambda *_: everyone)
    return runner.measure(case, CPU, NoMemory(), budget=0.0, patience=patience)["contenders"]


def our_call(case: Case = CASE):
    return next(c.call for c in contenders(case, CPU) if c.name == OURS)


@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0, float("nan")])
def test_a_wrong_gradient_shows(monkeypatch, factor: float) -> None:
    def wrong(x: Inputs) -> torch.Tensor:
        loss = our_call()(x)
        return loss.detach() + factor * (loss - loss.detach())

    found = measured(monkeypatch, Contender("wrong", "peer", wrong))
    assert suspicious(found["wrong"]["error"])
    assert found["wrong"]["error"]["grad_weight"] != pytest.approx(0, abs=0.5)
    assert not suspicious(found[OURS]["error"])


def test_a_wrong_loss_shows(monkeypatch) -> None:
    found = measured(monkeypatch, Contender("wrong", "peer", lambda x: our_call()(x) + 0.1))
    assert suspicious(found["wrong"]["error"])
    assert abs(found["wrong"]["error"]["grad_hidden"]) < 1e-4


def test_an_error_at_full_size_shows_when_only_some_tokens_are_checked(monkeypatch) -> None:
    from benchmarks.losses import truth

    monkeypatch.setattr(truth, "_CPU_ELEMENTS", 8 * TINY.vocab)

    def late_rows_lost(x: Inputs) -> torch.Tensor:
        if x.student.shape[0] <= 8:
            return our_call()(x)
        kept = torch.arange(x.student.shape[0]) < 24
        student = torch.where(kept[:, None], x.student, x.student.detach())
        part = x.rows(torch.arange(x.student.shape[0]))
        part.student = student
        return our_call()(part)

    found = measured(monkeypatch, Contender("late", "peer", late_rows_lost))
    assert found["late"]["error"]["grad_hidden"] > 0.1
    assert found[OURS]["error"]["grad_hidden"] < 1e-4


def test_who_is_absent_says_why(monkeypatch) -> None:
    def failing(x: Inputs) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    found = measured(
        monkeypatch,
        Contender("missing", "peer", our_call(), package="no_such_package"),
        Contender("triton", "peer", our_call(), needs_gpu=True),
        Contender("failing", "peer", failing),
        Contender("huge", "peer", our_call(), logits=2**40),
    )
    assert found["missing"]["why_not"] == "no_such_package is not installed"
    assert "needs a GPU" in found["triton"]["why_not"]
    assert found["failing"]["why_not"] == "RuntimeError: no such kernel"
    assert "GiB for its logits" in found["huge"]["why_not"]


def test_a_failure_of_ours_is_not_excused(monkeypatch) -> None:
    def failing(x: Inputs) -> torch.Tensor:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        measured(monkeypatch, Contender("opsd_kernels, broken", "ours", failing))


def test_every_case_compiles_afresh(monkeypatch) -> None:
    """Ten shapes in one process: Dynamo's limit is eight of one function."""

    @torch.compile(backend="eager", fullgraph=True, dynamic=False)
    def compiled(student: torch.Tensor) -> torch.Tensor:
        return 0 * student.sum()

    peer = Contender("c", "peer", lambda x: our_call()(x) + compiled(x.student), compiles=True)
    for tokens in range(8, 18):
        found = measured(monkeypatch, peer, case=dataclasses.replace(CASE, tokens=tokens))
        assert "why_not" not in found["c"], found["c"]


def test_a_slow_peer_is_timed_once(monkeypatch) -> None:
    found = measured(monkeypatch, Contender("slow", "peer", our_call()), patience=0.0)
    assert len(found["slow"]["seconds"]["both"]) == 1
    assert len(found[OURS]["seconds"]["both"]) == runner.MIN_ROUNDS


def test_the_floor_counts_the_products() -> None:
    """Two heads, one or two gradients; cross-entropy one head less."""
    for case, expected in ((CASE, 4), (dataclasses.replace(CASE, operation="cross_entropy"), 3)):
        x, count = Inputs(case, CPU), []
        floor = next(c for c in contenders(case, CPU) if c.name == FLOOR)
        from torch.utils._python_dispatch import TorchDispatchMode

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                count.append(function is torch.ops.aten.mm.default)  # noqa: B023
                return function(*args, **(kwargs or {}))

        with torch.no_grad(), Count():
            floor.call(x)()
        assert sum(count) == expected == case.gemms


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_sees_full_logits_and_not_ours() -> None:
    case = Case("cross_entropy", "frozen", "float32", dataclasses.replace(TINY, vocab=32768), 512)
    everyone = {c.name: c for c in contenders(case, CPU)}
    x = Inputs(case, CPU)
    with ProcessMemory() as memory:
        # The worker finds the case by its id, which names the shape of the tiny one.
        eager = memory.measure(everyone["PyTorch eager"], x)["peak_extra_mib"]
        ours = memory.measure(everyone[OURS], x)["peak_extra_mib"]
    full = 512 * 32768 * 4 / 2**20
    assert eager["both"] > 1.9 * full
    assert 5 < ours["both"] < 0.9 * full
    assert eager["both"] == max(eager["forward"], eager["backward"])


def test_selections() -> None:
    default = cases.default_cases(CPU)
    assert len({case.id for case in default}) == len(default)
    assert {case.operation for case in default} == set(cases.OPERATIONS)
    assert {case.inputs for case in default} == {"random", "close", "real"}
    full = cases.full_cases(CPU, 24 * 2**30)
    assert {case.id for case in default} <= {case.id for case in full}
    gpu = torch.device("cuda")
    large = cases.full_cases(gpu, 80 * 2**30)
    assert {case.id for case in cases.default_cases(gpu)} <= {case.id for case in large}
    assert max(case.tokens for case in large) == 65536
    assert all(cases.find(case.id) == case for case in (*full, *large))
    with pytest.raises(ValueError, match="unknown case"):
        cases.find("jsd-frozen-bfloat16-gpt2-256-random")


def test_real_inputs_that_are_not_there(monkeypatch, tmp_path) -> None:
    from benchmarks.losses import inputs

    monkeypatch.setattr(inputs, "REAL_PAIR", tmp_path / "absent.pt")
    with pytest.raises(MissingInputs, match=r"benchmarks\.real_pair"):
        Inputs(Case("jsd", "frozen", "bfloat16", SMOLLM2, 256, "real"), CPU)


def test_gpu_report_in_its_small_mode(tmp_path, capfd) -> None:
    if not torch.cuda.is_available():
        assert gpu_report.main(["--out", str(tmp_path)]) == 2
        assert "--small" in capfd.readouterr().err
    assert gpu_report.main(["--out", str(tmp_path), "--small", "--commit", "abc"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert report["other_tests"]["tests"] > 10 and report["other_tests"]["failed"] == []
    assert report["cases"] == len(losses["cases"]) == 6
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert all(len(kernels) > 3 for case in stages.values() for kernels in case.values())
    assert losses["kind"] == "losses" and losses["environment"]["commit"]


def test_gpu_report_reports_a_failing_test(tmp_path) -> None:
    failing = tmp_path / "test_x.py"
    failing.write_text("def test_x():\n    assert 1 == 2\n")
    found = gpu_report.run_tests(tmp_path / "x.json", [str(failing), "-k", "test_x"], 1e12)
    assert [f["test"].rpartition("::")[2] for f in found["failed"]] == ["test_x"]
    assert "1 == 2" in found["failed"][0]["message"]
    assert gpu_report.run_tests(tmp_path / "y.json", [], 0.0)["not_run"] == "no time was left"


def test_gpu_report_measures_on_when_a_case_fails(monkeypatch, tmp_path) -> None:
    def failing(case: Case, *_: object, **__: object) -> dict:
        if case.operation == "jsd":
            raise RuntimeError("no kernel image")
        return {"id": case.id}

    shown = []
    monkeypatch.setattr(gpu_report, "measure", failing)
    monkeypatch.setattr(gpu_report, "render", shown.append)
    options = gpu_report._options(["--out", str(tmp_path), "--small"])
    record = gpu_report.run_cases(tmp_path / "x.json", CPU, 1e12, options)
    assert len(record.cases) == 5 and len(shown) == 1
    assert [entry["why"] for entry in record.skipped] == ["failed: RuntimeError('no kernel image')"]
