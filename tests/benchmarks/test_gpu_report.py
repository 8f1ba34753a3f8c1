"""The commands for a machine with a GPU: rehearsed on the CPU, and what counts as failed."""

import dataclasses
import importlib
import json
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import counters, sanitizer, smoke, step, suite, sweeps, training_run
from benchmarks.gpu_report.conductor import Stage, run_stage
from benchmarks.gpu_report.job import GpuJob
from benchmarks.gpu_report.winners import tiles
from benchmarks.losses import contenders
from benchmarks.losses.cases import DIFFERENTIATED, ONE_HEAD, OPERATIONS
from benchmarks.losses.truth import BETA
from opsd_kernels.plan import SCHEDULES

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal on a CPU")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def stages_of(report: dict) -> dict[str, dict]:
    return {stage["name"]: stage for stage in report["stages"]}


# -------------------------------------------------------------------------------- the commands


@ON_CPU
@pytest.mark.slow
def test_the_commands_in_their_small_mode(tmp_path, capsys) -> None:
    """The second takes what the first wrote; every stage ran or says why it cannot here."""
    out = ["--out", str(tmp_path), "--small", "--commit", "abc"]
    assert command.main(["first", *out]) == 0
    printed = capsys.readouterr().out
    assert "ceilings copy: " in printed and "0 failed; " in printed
    assert command.main(["second", *out, "--winners", str(tmp_path / "winners.json")]) == 0
    assert "x floor" in capsys.readouterr().out
    assert command.main(["trainer", *out]) == 0
    first, second, trainer = (read(tmp_path / f"{name}.json") for name in command.STAGES)
    for report in (first, second, trainer):
        assert report["kind"] == "gpu_report" and report["failed"] == []
        assert report["environment"]["device"] and report["environment"]["commit"]
        lines = (tmp_path / f"{report['command']}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == report["rows"]
        assert [stage["name"] for stage in report["stages"]] == [
            stage.name for stage in command.STAGES[report["command"]]
        ]
        absent = {row["stage"] for row in report["rows"] if "absent" in row}
        assert absent <= {"counters", "sanitizer"}
    # What a machine gives back: a few files in one folder.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"winners.json"} | {
        f"{name}.{suffix}" for name in command.STAGES for suffix in ("json", "jsonl", "log")
    }
    check_first(first)
    check_second(second, read(tmp_path / "winners.json"))
    assert all(stage["found"] > 1 for stage in trainer["stages"])


def check_first(report: dict) -> None:
    rows = {(row["stage"], row["id"]): row.get("found") for row in report["rows"]}
    assert rows["ceilings", "copy"]["gb_per_s"] > 0
    assert sum(stage == "ceilings" for stage, _ in rows) == 2 + 14 + 4 + 6
    smoke = {tuple(i.split()[:4]) for stage, i in rows if stage == "smoke"}
    every = [schedule for schedule in SCHEDULES if schedule != "auto"]
    assert smoke == {
        (loss, schedule, "fp32", head)
        for loss in DIFFERENTIATED
        for schedule in every
        for head in (("one",) if loss in ONE_HEAD else ("shared", "distinct"))
    }
    assert {"row own", "streaming own", "rows 8"} <= {i for stage, i in rows if stage == "sweeps"}
    assert stages_of(report)["suite"]["found"] > 5


def check_second(report: dict, winners: dict) -> None:
    rows = {(row["stage"], row["id"]): row.get("found") for row in report["rows"]}
    assert report["winners"] == winners["tiles"]
    operations = {i.split("-")[0] for stage, i in rows if stage == "losses"}
    assert operations == set(OPERATIONS)
    losses = [found for (stage, _), found in rows.items() if stage == "losses"]
    assert losses[0]["contenders"]["opsd_kernels"]["seconds"]["both"]
    for schedule in (x for x in SCHEDULES if x != "auto"):
        found = rows["kernels", f"jsd frozen {schedule} fp32 distinct"]
        names = [name for name, _, _ in found["kernels"]]
        first = "resident_divergence" if schedule == "blocked" else "statistics_pair"
        assert found["ms"] > 0 and any(first in name for name in names), names
        assert any(name.startswith(("mm ", "addmm ")) for name in names), names
    steps = [found for (stage, _), found in rows.items() if stage == "step"]
    assert len(steps) == 4
    for found in steps:
        phases = ("teacher forward", "student forward", "loss", "backward", "optimizer")
        assert all(found["phases"][name][0] > 0 for name in phases)
        assert found["loss_tokens"] == 16
        assert found["loss"][0] > 1e-5


def test_both_steps_of_the_optimizer_are_the_same(tmp_path) -> None:
    """Ours and plain logits: loss and every trained gradient, whatever the micro-batch."""
    run = step.StepRun(step._SMALL, GpuJob("second", str(tmp_path), True))
    run.optimizer.param_groups[0]["lr"] = 0.0
    ours, plain = step.contenders()
    found = []
    for contender, at_once in ((ours, 2), (plain, 2), (ours, 1), (plain, 1)):
        loss = run.measure(contender, at_once)["loss"]
        found.append((loss, torch.cat([p.grad.flatten() for p in run.trained])))
    assert found[0][0] > 1e-5 and found[0][1].norm() > 1e-5
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-3)
        assert (gradient - found[0][1]).norm() < 1e-3 * found[0][1].norm()


@pytest.mark.parametrize("recipe", training_run.RECIPES)
def test_steps_of_the_trainer(tmp_path, recipe: str) -> None:
    found = training_run.run(recipe, GpuJob("trainer", str(tmp_path), True))
    phases = ("rollout", "grading", "teacher", "student", "optimizer")
    assert tuple(found["seconds"]) == phases
    assert all(len(values) == 1 and values[0] > 0 for values in found["seconds"].values())
    assert set(found["expected_mib"]) == {*phases, "load"} - {"grading"}


@ON_CPU
def test_without_a_gpu_only_the_small_mode_runs(tmp_path, capsys) -> None:
    assert command.main(["first", "--out", str(tmp_path)]) == 2
    assert "--small" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", '{"row": {}}'])
def test_winners_that_are_none_are_refused(tmp_path, capsys, content: str | None) -> None:
    winners = tmp_path / "w.json"
    if content is not None:
        winners.write_text(content)
    arguments = ["second", "--out", str(tmp_path / "out"), "--small", "--winners", str(winners)]
    assert command.main(arguments) == 2
    assert "is not what `first` writes" in capsys.readouterr().err


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> GpuJob:
    """A job whose ids are those of a machine with a GPU and Nsight's tools."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(GpuJob, "device", cuda)
    for module in (counters, sanitizer):
        monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(contenders, "backend_name", lambda *_: "triton")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **how: empty(*a, **how | {"device": "cpu"}))
    monkeypatch.setattr(suite, "dealt", lambda *_: [["tests/kernels/test_x.py::test_x"]])
    return GpuJob("first", "", False, {})


@pytest.mark.parametrize("name", command.STAGES)
def test_what_a_gpu_is_asked(as_on_a_gpu, name: str) -> None:
    """Every id once, dealt to at most 12 processes; the limits add up to the command's time."""
    job = dataclasses.replace(as_on_a_gpu, command=name)
    for stage in command.STAGES[name]:
        shards = importlib.import_module(stage.path).shards(job)
        ids = [i for shard in shards for i in shard]
        assert ids and len(ids) == len(set(ids)) and len(shards) <= 12, stage
    assert sum(stage.limit for stage in command.STAGES[name]) == command.SECONDS[name]


def test_a_gpu_checks_every_loss_schedule_head_dtype_and_vocabulary(as_on_a_gpu) -> None:
    shards = smoke.shards(as_on_a_gpu)
    schedules = len(SCHEDULES) - 1
    fp32 = [i for shard in shards for i in shard if " fp32 " in i]
    # Two losses of one head, five of a pair.
    assert len(fp32) == schedules * (5 * 2 + 2) * 4
    differences = {i for shard in shards for i in shard if " difference " in i}
    losses = {tuple(i.split()[::3]) for i in differences}
    assert losses == {(loss, head) for loss in BETA for head in ("shared", "distinct")}
    assert all("bfloat16" in i for i in differences)
    for shard in shards:  # a process holds one head's size, and few hold the largest
        assert len({tuple(i.split()[4:]) for i in shard}) == 1
    assert [i for i in sweeps.tile_ids(as_on_a_gpu) if not sweeps.blocks_of(i)] == [
        "row own",
        "streaming own",
        "difference own",
    ]


# -------------------------------------------------------------------------- what did not run


@ON_CPU
def test_a_stage_out_of_time_and_one_never_started_are_failures(
    tmp_path, monkeypatch, capsys
) -> None:
    stages = (Stage("ceilings", 0.2), Stage("losses", 60), Stage("step", 60))
    monkeypatch.setitem(command.STAGES, "first", stages)
    monkeypatch.setitem(command.SECONDS, "first", 0.2)
    assert command.main(["first", "--out", str(tmp_path), "--small"]) == 1
    report = read(tmp_path / "first.json")
    failed = {(row["stage"], row["id"]): row["failed"] for row in report["failed"]}
    assert len([stage for stage, _ in failed if stage == "ceilings"]) == 26
    assert failed["ceilings", "copy"].startswith("not done: the stage was stopped after 0.")
    assert failed["losses", "jsd-frozen-float32-tiny-48-random"] == "no time was left"
    assert failed["step", "opsd_kernels, 2 at once"] == "no time was left"
    assert "FAILED losses, jsd-frozen-float32-tiny-48-random" in capsys.readouterr().out


@ON_CPU
def test_only_the_stages_asked_for_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(command.SECONDS, "first", 0.2)
    call = ["first", "--out", str(tmp_path), "--small", "--stages"]
    command.main([*call, "smoke"])
    report = read(tmp_path / "first.json")
    assert [stage["name"] for stage in report["stages"]] == ["smoke"]
    assert {row["stage"] for row in report["rows"]} == {"smoke"}
    with pytest.raises(SystemExit, match="2"):
        command.main([*call, "smoke,step"])
    assert "expected some of ceilings, smoke, suite" in capsys.readouterr().err


@ON_CPU
def test_time_that_others_leave_is_for_the_stages_asked_for(tmp_path, monkeypatch) -> None:
    """All tests take longer than their share of the whole command."""
    limits = []

    def ran(stage: Stage, job: GpuJob, limit: float) -> dict:
        limits.append(limit)
        return {"name": stage.name, "limit": limit, "seconds": 0.0}

    monkeypatch.setattr(command, "run_stage", ran)
    monkeypatch.setattr(command.summary, "lines", lambda *_: [])
    call = ["first", "--out", str(tmp_path), "--small", "--stages", "suite,sanitizer"]
    assert command.main(call) == 0
    whole, sanitizing = command.SECONDS["first"], command.STAGES["first"][3].limit
    assert limits == pytest.approx([whole - sanitizing, whole], abs=5)


@ON_CPU
def test_the_second_command_needs_no_winners(tmp_path, monkeypatch) -> None:
    """README and the result tables name it so."""
    monkeypatch.setitem(command.SECONDS, "second", 0.2)
    command.main(["second", "--out", str(tmp_path), "--small", "--stages", "step"])
    assert read(tmp_path / "second.json")["winners"] is None


def test_a_machine_taken_away_leaves_what_was_done_and_names_the_rest(tmp_path) -> None:
    """The report as it is between two stages."""
    job = GpuJob("first", str(tmp_path), True)
    job.at("ceilings").append({"id": "copy", "found": {"ms": 1.0}})
    (tmp_path / "first.jsonl").open("a").write('{"stage": "ceilings", "id": "half a li')
    failed = command.write_report({"command": "first"}, job, (Stage("smoke", 1),))
    assert failed == [{"stage": "smoke", "id": "the stage", "failed": "not started"}]
    report = read(tmp_path / "first.json")
    assert [row["id"] for row in report["rows"]] == ["copy"] and report["failed"] == failed


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs a stage whose `work` is given as code, over the ids of each process."""

    def run(work: str, limit: float = 60.0, shards: tuple[str, ...] = ("abc",)) -> dict[str, dict]:
        code = "import os, sys\ndef shards(job):\n    "
        code += f"return {[list(ids) for ids in shards]}\n"
        code += "def work(ids, job, emit):\n    for i in ids:\n"
        (tmp_path / "other_stage.py").write_text(code + textwrap.indent(work, 8 * " "))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        job = GpuJob("first", str(tmp_path), True)
        run_stage(Stage("other", limit, module="other_stage"), job, limit)
        rows = job.at("other").rows()
        assert len(rows) == len({row["id"] for row in rows})
        return {row["id"]: row for row in rows}

    yield run
    import sys

    sys.modules.pop("other_stage", None)


def test_a_process_that_dies_is_named_and_the_rest_goes_on(stage) -> None:
    rows = stage(
        "if i == 'b':\n    os._exit(5)\nemit({'id': i, 'found': {}})\n", shards=("abc", "def")
    )
    assert rows.pop("b")["failed"] == "its process ended with exit status 5 before it was done"
    assert set(rows) == set("acdef") and all("found" in row for row in rows.values())


def test_a_lost_cuda_context_costs_one_result_and_no_other(stage) -> None:
    rows = stage(
        "emit({'id': i, 'failed' if i == 'b' else 'found': 'x'})\ni == 'b' and sys.exit(17)"
    )
    assert [i for i, row in rows.items() if "failed" in row] == ["b"] and len(rows) == 3


def test_a_process_that_hangs_is_stopped_with_what_it_started(stage, tmp_path) -> None:
    started = time.time()
    rows = stage(
        "import subprocess\n"
        "emit({'id': i, 'found': {}})\n"
        f"i == 'a' and subprocess.run(['sh', '-c', 'sleep 20; touch {tmp_path}/late'])\n",
        limit=8.0,
    )
    assert time.time() - started < 15
    assert "found" in rows["a"] and {"b", "c"} == {i for i in rows if "failed" in rows[i]}
    assert "stopped after 8 s" in rows["b"]["failed"]


def test_ids_that_cannot_be_listed_are_a_failure(tmp_path) -> None:
    job = GpuJob("first", str(tmp_path), True)
    summary = run_stage(Stage("missing", 1, module="benchmarks.no_such_stage"), job, 1)
    assert summary["failed"] == 1 and "no_such_stage" in job.rows()[0]["failed"]


def test_wheels_that_do_not_install_are_a_failure(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("not a wheel")
    monkeypatch.setattr(command, "WHEELS", tmp_path)
    job = GpuJob("first", str(tmp_path), True)
    assert command.install_wheels(tmp_path / "site", job) == []
    assert "CalledProcessError" in job.at("wheels").rows()[0]["failed"]


# ----------------------------------------------------------------------- winners


def row(identifier: str, ms: float) -> dict:
    return {"stage": "sweeps", "id": identifier, "found": {"ms": ms}}


def test_a_winner_beats_the_launchers_own_by_more_than_noise() -> None:
    rows = [row("row own", 10.0), row("row 2048x4", 9.9), row("row 8192x16", 11.0)]
    assert sweeps.winners(rows) == {}
    rows += [row("row 4096x4", 9.0), {"id": "row 2048x8", "absent": "too large"}]
    rows += [row("streaming own", 30.0), row("streaming 64x128x64x4x3", 20.0), row("rows 384", 1.0)]
    tile = {"rows": 64, "cols": 128, "inner": 64, "warps": 4, "stages": 3, "parts": 4}
    assert sweeps.winners(rows) == {"row": {"columns": 4096, "warps": 4}, "streaming": tile}
    assert sweeps.winners([row("row 4096x4", 9.0)]) == {}


def test_winners_change_what_the_launchers_take_and_only_that() -> None:
    from opsd_kernels.backends import triton_config, triton_launch, triton_rows_launch

    hopper = triton_config.Device((9, 0), 132)
    fused = {"pair": True, "depths": [4096], "itemsize": 2, "aligned": True, "device": hopper}
    tile = {"rows": 64, "cols": 64, "inner": 32, "warps": 4, "stages": 2, "parts": 2}
    own, own_row = triton_launch.blocks, triton_rows_launch.row_blocks
    with tiles({"row": {"columns": 8192, "warps": 16}, "streaming": tile}):
        changed = triton_rows_launch.row_blocks(151936, hopper)
        assert changed == triton_config.RowBlocks(8192, 16, 512) != own_row(151936, hopper)
        assert triton_rows_launch.row_blocks(5000, hopper) == own_row(5000, hopper)
        assert triton_launch.blocks(**fused) == triton_config.Blocks(**tile)
        for other in ({"pair": False}, {"itemsize": 4}, {"aligned": False}):
            assert triton_launch.blocks(**fused | other) == own(**fused | other)
    assert (triton_launch.blocks, triton_rows_launch.row_blocks) == (own, own_row)
