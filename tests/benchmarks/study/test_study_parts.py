"""A study in pieces, the choice of each method's settings, and the signals of long runs."""

import json
from pathlib import Path

import pytest

from benchmarks.study.collect import as_text, collect
from benchmarks.study.comparison import compare
from benchmarks.study.earlier import Earlier, digest
from benchmarks.study.long_runs import signals_table
from benchmarks.study.page import write_page
from benchmarks.study.plan import Plan, make_plan
from benchmarks.study.reading import NONE
from benchmarks.study.run import _jobs, _weights_needed
from benchmarks.study.settings import Experiment, load_shared
from benchmarks.study.signals import signals
from benchmarks.study.tuning import Choice, chosen, tuning_table
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from
from tests.helpers.study_results import made_up

TEXTS = {key: "…" for key in ("title", "paper", "paper_says", "question")}
ARMS = [
    {"name": "base", "label": "before", "base_model": True},
    {"name": "opsd", "label": "OPSD"},
    {"name": "sft", "label": "SFT", "changes": ["method=sft", "loss.beta=0.5"]},
]
SAMPLING = {"samples": 2, "max_new_tokens": 4, "temperature": 1.0}


def plan_of(folder: Path, *more: str) -> Plan:
    arms = [arm | {"changes": [*arm.get("changes", []), *more]} for arm in ARMS]
    made = {"arms": arms, "tasks": ["sums"], "seeds": [0, 1], "sampling": SAMPLING}
    experiment = config_from(TEXTS | made, cls=Experiment)
    return make_plan(load_shared(), {"e": experiment}, folder, quick=False)


def finish(plan: Plan, name: str) -> None:
    """A run's folder as it is when the run has ended."""
    folder = plan.runs[name].folder
    folder.mkdir(parents=True)
    summary = {"status": "finished", "steps": 18, "tokens": 100, "seconds": {"total": 5.0}}
    (folder / "summary.json").write_text(json.dumps(summary | {"peak_memory_mib": 1.0}))
    steps = [0, 6, 12, 18] if plan.runs[name].start == name else [6, 12, 18]
    rows = [{"step": step, "correct": "01" * 48, "tokens": step, "accuracy": 0.5} for step in steps]
    (folder / "evaluations.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_later_part_does_not_run_what_an_earlier_one_has(tmp_path: Path) -> None:
    first = plan_of(tmp_path / "one")
    for name in ("sums-opsd-s0", "sums-sft-s0"):
        finish(first, name)
    results = collect(first, "full", Earlier())
    (tmp_path / "part.json").write_text(as_text(results))
    assert json.loads(as_text(results)) == results

    later = plan_of(tmp_path / "two")  # of another machine: no run folder is there
    earlier = Earlier.read(tmp_path / "part.json")
    found = collect(later, "full", earlier)
    for name in ("sums-opsd-s0", "sums-sft-s0"):
        assert found["runs"][name] == results["runs"][name]
        assert [row["step"] for row in found["runs"][name]["evaluations"]] == [0, 6, 12, 18]
    assert found["runs"]["sums-sft-s1"]["status"] == "missing"
    finish(later, "sums-sft-s1")  # which starts from a run that only the record has
    rows = collect(later, "full", earlier)["runs"]["sums-sft-s1"]["evaluations"]
    assert [row["step"] for row in rows] == [0, 6, 12, 18]
    # Of other settings, or where its weights are needed, a run is made again.
    other = plan_of(tmp_path / "three", "optim.lr=1e-3")
    assert collect(other, "full", earlier)["runs"]["sums-opsd-s0"]["status"] == "missing"
    assert digest(other.runs["sums-opsd-s0"]) != digest(later.runs["sums-opsd-s0"])
    assert earlier.without(["sums-opsd-s0"]).run(later.runs["sums-opsd-s0"]) is None


def test_parts_of_two_machines(tmp_path: Path) -> None:
    first = plan_of(tmp_path / "one")
    finish(first, "sums-opsd-s0")
    results = collect(first, "full", Earlier())
    here = results["device"]
    assert results["runs"]["sums-opsd-s0"]["device"] == here
    assert results["runs"]["sums-sft-s0"]["device"] is None
    results["device"] = "another, 8 cores"
    del results["runs"]["sums-opsd-s0"]["device"]  # as in a part of an earlier version
    (tmp_path / "part.json").write_text(json.dumps(results))
    earlier, later = Earlier.read(tmp_path / "part.json"), plan_of(tmp_path / "two")
    assert collect(later, "full", earlier)["device"] == "another, 8 cores"  # nothing has run here
    finish(later, "sums-sft-s0")
    found = collect(later, "full", earlier)
    assert found["runs"]["sums-sft-s0"]["device"] == here
    assert found["device"] == f"another, 8 cores and {here}"


def test_only_a_wanted_sampling_has_its_run_made_again(tmp_path: Path) -> None:
    first = plan_of(tmp_path / "one")
    finish(first, "sums-opsd-s0")
    (tmp_path / "part.json").write_text(json.dumps(collect(first, "full", Earlier())))
    earlier, later = Earlier.read(tmp_path / "part.json"), plan_of(tmp_path / "two")
    (later.folder / "base").mkdir(parents=True)  # stands for the model, which takes 20 s to unpack
    (planned,) = later.experiments
    needed = _weights_needed(later, [planned], earlier)
    assert needed == {"sums-opsd-s0", "sums-sft-s0"}
    assert _weights_needed(later, [], earlier) == set()
    jobs = [job.id for job in _jobs(later, planned.ids, earlier.without(needed))]
    assert "sums-opsd-s0" in jobs and collect(later, "full", earlier)["runs"]["sums-opsd-s0"]
    assert "sums-opsd-s0" not in [job.id for job in _jobs(later, {"sums-opsd-s0"}, earlier)]


def test_a_part_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--earlier .*gone\.json"):
        Earlier.read(tmp_path / "gone.json")


def tuned(accuracies: dict[str, list[list[float]]]) -> dict:
    """Results of a tuning: method -> rate -> accuracy after 6 and 12 steps."""
    runs, arms = {}, []
    for method, rates in accuracies.items():
        for number, (rate, values) in enumerate(zip(("1e-4", "5e-4"), rates, strict=True)):
            name = f"tune-{method}-{number}"
            changes = [f"method={method}", f"optim.lr={rate}"]
            arms.append({"name": name, "label": f"{method}, {rate}", "changes": changes})
            arms[-1]["runs"] = {"sums": [f"sums-{name}"]}
            rows = [{"step": 6 * (i + 1), "accuracy": v} for i, v in enumerate(values)]
            runs[f"sums-{name}"] = {"status": "finished", "evaluations": rows}
    base = {"name": "base", "label": "before", "runs": {}, "changes": []}
    tuning = {"kind": "tuning", "read": [6, 12], "arms": [base, *arms]}
    return {"runs": runs, "experiments": [tuning]}


def test_the_best_of_each_method_and_of_equals_the_cheaper() -> None:
    results = tuned({"sft": [[0.2, 0.3], [0.4, 0.1]], "grpo": [[0.1, 0.5], [0.5, 0.5]]})
    wanted = [Choice("sft", "5e-4", 6, 0.4), Choice("grpo", "5e-4", 6, 0.5)]
    assert chosen(results) == wanted
    later = tuned({"sft": [[0.2, 0.3, 0.9], [0.4, 0.1, 0.9]]})  # after 18 steps: not to be chosen
    assert chosen(later) == [Choice("sft", "5e-4", 6, 0.4)]
    equal = tuned({"sft": [[0.4, 0.3], [0.4, 0.1]]})
    assert chosen(equal) == [Choice("sft", "1e-4", 6, 0.4)]
    header, rows = tuning_table(results)
    assert header[1:] == ["1e-4", "5e-4", "chosen"]
    assert rows[0] == ["sft", "20.0 / 30.0", "40.0 / 10.0", "5e-4, 6 steps"]
    results["runs"]["sums-tune-sft-0"]["status"] = "missing"
    assert [choice.method for choice in chosen(results)] == ["grpo"]
    assert tuning_table(results)[1][0][1:] == [NONE, "40.0 / 10.0", NONE]
    assert chosen({"runs": {}, "experiments": []}) == []


def test_an_arm_is_read_where_its_recipe_says() -> None:
    results = made_up(problems=20, seeds=2, tasks=["sums"])
    (experiment,) = (e for e in results["experiments"] if e["name"] == "methods")
    last = {arm.name: arm for arm in compare(results, experiment).arms}
    for arm in experiment["arms"]:
        arm["read_at"] = 10 if arm["name"] == "opsd" else None
    found = {arm.name: arm for arm in compare(results, experiment).arms}
    runs = [run for run in results["runs"].values() if run["arm"] == "opsd"]
    rows = [row for run in runs for row in run["evaluations"] if row["step"] == 10]
    assert found["opsd"].final["sums"].value == pytest.approx(
        sum(row["correct"].count("1") for row in rows) / (20 * len(rows))
    )
    assert found["sft"].final["sums"].value == last["sft"].final["sums"].value
    assert compare(results, experiment).arms[-1].curves["sums"].columns[-1] == 40


def test_signals_are_what_the_monitor_would_have_said(tmp_path: Path) -> None:
    rows = []
    for step in range(1, 61):
        entropy = 2.0 + 0.01 * (step % 3) - (0.1 * (step - 30) if step > 30 else 0)
        rows.append({"step": step, "student_entropy": entropy, "divergence": 0.5, "loss": 1.0})
        rows[-1]["trained"] = 0.0 if step > 45 else 1.0
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = signals(tmp_path)
    assert set(found["first"]) == {"student_entropy", "trained"}
    assert found["first"]["trained"] == [55, "below"]
    step, side = found["first"]["student_entropy"]
    assert side == "below" and 33 <= step <= 45
    assert found["curves"]["divergence"] == [0.5] * 6
    assert found["curves"]["student_entropy"][0] == pytest.approx(2.01, abs=2e-3)
    assert "clipped_mass" not in found["curves"]


def test_the_page_of_long_runs(tmp_path: Path) -> None:
    results = made_up(problems=20, seeds=2, tasks=["sums"])
    (experiment,) = (e for e in results["experiments"] if e["name"] == "objectives")
    experiment["kind"] = "collapse"
    for name, run in results["runs"].items():
        first = {"student_entropy": [40, "below"]} if name.endswith("s0") else {}
        curves = {n: [1.0, 0.5] for n in ("completion_length", "student_entropy", "divergence")}
        run["signals"] = {"first": first, "curves": curves}
    header, rows = signals_table(results, compare(results, experiment))
    assert header[4] == "entropy, first warning"
    assert {row[4] for row in rows} == {f"40 ↓, {NONE}"} and {row[3] for row in rows} == {NONE}
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_page(tmp_path)
    assert (tmp_path / "figures" / "objectives-long-runs.svg").stat().st_size > 10_000
    assert "first warning" in (tmp_path / "study.md").read_text()
