"""The study's recipes against each other, and runs that experiments share."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.plan import Plan, PlannedExperiment, fingerprint, make_plan
from benchmarks.study.settings import RECIPES, Arm, Experiment, load_experiments, load_shared
from benchmarks.study.tuning import chosen
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe

FOLDER = Path("runs/somewhere")
PUBLISHED = Path(__file__).parents[3] / "docs" / "study" / "results.json"


@functools.cache
def planned(quick: bool, *only: str) -> Plan:
    """The plan of these experiments; of all if none is named."""
    shared = load_shared()
    experiments = {n: e for n, e in load_experiments(shared).items() if not only or n in only}
    return make_plan(shared, experiments, FOLDER, quick=quick)


def experiment(**changes: object) -> Experiment:
    texts = {key: "…" for key in ("title", "paper", "paper_says", "question")}
    return config_from({**texts, **changes}, cls=Experiment)


def test_every_recipe_of_the_study_is_run() -> None:
    files = {file.stem for file in RECIPES.glob("*.yaml")}
    assert {*load_shared().experiments, "shared"} == files


def named(plan: Plan, name: str) -> PlannedExperiment:
    (found,) = (planned for planned in plan.experiments if planned.name == name)
    return found


@pytest.mark.parametrize("quick", [True, False])
def test_table_2_has_its_methods_tasks_and_seeds(quick: bool) -> None:
    plan = planned(quick, "methods")
    methods = named(plan, "methods")
    runs = [plan.runs[i] for ids in methods.runs.values() for names in ids.values() for i in names]
    wanted = ("sft", "grpo", "star", "context_distill", "opsd")
    tasks = ("sums", "products", "letters")
    found = {(run.task, run.config.method, run.seed) for run in runs}
    assert found == {(t, m, s) for t in tasks for m in wanted for s in (0, 1, 2)}
    assert {run.config.evaluation.problems for run in runs} == {48 if quick else 72}


def test_as_many_completions_a_step_for_every_method() -> None:
    plan = planned(False, "methods", "tokens")
    ids = {name for e in ("methods", "tokens") for name in named(plan, e).ids}
    for config in (plan.runs[name].config for name in ids):
        rollout = config.rollout
        assert config.problems_per_step * rollout.samples_per_prompt == 16
        assert rollout.max_new_tokens == 24


def test_each_method_is_tuned_by_the_same_budget() -> None:
    """Three rates each, otherwise as in what follows, on other held-out problems and one seed."""
    plan = planned(False, "tuning", "methods", "tokens")
    tuning, others = named(plan, "tuning"), ("methods", "tokens")
    arms = {arm.name: arm for e in others for arm in named(plan, e).experiment.arms}
    tuned: dict[str, list[str]] = {}
    for arm in tuning.experiment.arms:
        if not arm.base_model:
            method = arm.name.removeprefix("tune-").rpartition("-")[0]
            *same, rate = arm.changes
            tuned.setdefault(method, []).append(rate)
            free = ("optim.lr=", "steps=")
            assert same == [c for c in arms[method].changes if not c.startswith(free)]
    assert set(tuned) == {name for name in arms if name != "base"}
    assert all(
        rates == ["optim.lr=1e-4", "optim.lr=5e-4", "optim.lr=1.5e-3"] for rates in tuned.values()
    )
    steps = plan.runs[next(iter(named(plan, "methods").ids))].config.steps
    assert tuning.experiment.read == [6, 12] and steps == 12
    configs = [plan.runs[name].config for name in tuning.ids]
    assert {(c.data.seed, c.seed, c.data.task) for c in configs} == {(1, 100, "chain_sum")}


def test_each_method_has_what_its_tuning_chose() -> None:
    results = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    choices = {choice.method: choice for choice in chosen(results)}
    varied = ("contexts", "topk", "objectives", "length", "collapse")
    plan = planned(False, "methods", "tokens", *varied)
    for planned_experiment in plan.experiments:
        experiment, runs = planned_experiment.experiment, planned_experiment.runs
        # Curves have all steps, and pass@k is sampled with the last step's weights.
        to_the_end = planned_experiment.name in ("tokens", "length", "collapse")
        for arm in experiment.arms:
            choice = choices.get(arm.name, choices["opsd"])  # what varies OPSD has OPSD's
            ids = [name for names in runs.get(arm.name, {}).values() for name in names]
            assert {plan.runs[i].config.optim.lr for i in ids} <= {float(choice.rate)}
            steps = 12 if to_the_end or arm.base_model else choice.steps
            assert (arm.read_at or (not arm.base_model and experiment.read_at) or 12) == steps
    own = {arm.name for e in ("methods", "tokens") for arm in named(plan, e).experiment.arms}
    assert own - {"base"} == set(choices)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_same_settings_are_run_once(quick: bool) -> None:
    plan = planned(quick)
    prints = [fingerprint(run.config) for run in plan.runs.values()]
    assert len(set(prints)) == len(prints)
    methods, tokens = named(plan, "methods"), named(plan, "tokens")
    assert tokens.runs["opsd"] == methods.runs["opsd"]
    assert tokens.runs["grpo"] == methods.runs["grpo"]
    for other in plan.experiments:
        if "opsd" in other.runs:
            assert other.runs["opsd"]["sums"][0] == methods.runs["opsd"]["sums"][0]


def test_the_model_before_training_is_measured_once_for_each_task_and_prompt() -> None:
    plan = planned(quick=True)
    starts = [run.id for run in plan.runs.values() if run.config.evaluation.at_start]
    assert starts == [
        "sums-opsd-s0",
        "products-opsd-s0",
        "letters-opsd-s0",
        "sums-answer-only-s0",
        "sums-reference-free-s0",
    ]
    for run in plan.runs.values():
        assert run.config.evaluation.teacher == run.config.evaluation.at_start
        start = plan.runs[run.start]
        assert start.id in starts and start.task == run.task
        assert start.config.prompts == run.config.prompts
        assert start.config.data == run.config.data and start.config.model == run.config.model


def test_without_opsd_the_first_run_measures_what_all_start_from() -> None:
    sft = ["method=sft", "loss.beta=0.5"]
    arms = [
        {"name": "a", "label": "a", "changes": sft},
        {"name": "b", "label": "b", "changes": [*sft, "model.dtype=float32"]},
    ]
    shared = load_shared()
    plan = make_plan(shared, {"e": experiment(arms=arms, tasks=["sums"])}, FOLDER, quick=True)
    found = {run.id: run.start for run in plan.runs.values()}
    assert found == {f"sums-{a}-s{seed}": f"sums-{a}-s0" for a in "ab" for seed in (0, 1, 2)}


def test_an_experiment_by_itself_needs_what_its_runs_start_from() -> None:
    sft = {"name": "sft", "label": "sft", "changes": ["method=sft", "loss.beta=0.5"]}
    both = {
        name: experiment(arms=[arm], tasks=["sums"])
        for name, arm in (("e", {"name": "opsd", "label": "opsd"}), ("f", sft))
    }
    plan = make_plan(load_shared(), both, FOLDER, quick=True)
    own = {f"sums-sft-s{seed}" for seed in (0, 1, 2)}
    assert plan.experiments[1].ids == own
    assert plan.needed(plan.experiments[1:]) == own | {"sums-opsd-s0"}


def test_words_give_the_run_again() -> None:
    for run in planned(quick=True).runs.values():
        recipe, *changes = run.words
        assert config_from(load_recipe(recipe), changes) == run.config


def test_samplings_ask_the_problems_of_their_runs() -> None:
    plan = planned(quick=True)
    length = next(p for p in plan.experiments if p.name == "length")
    assert set(length.samplings) == {"base", "length-10", "opsd", "length-48"}
    for arm, tasks in length.samplings.items():
        for task, (name,) in tasks.items():
            sampled = plan.samplings[name]
            assert sampled.run == (None if arm == "base" else length.runs[arm][task][0])
            assert plan.runs[sampled.problems_of].task == task
            assert json.dumps(sampled.words("m"))  # plain words


def test_mistakes_in_recipes_are_named() -> None:
    shared = load_shared()
    arm = {"name": "a", "label": "a"}
    with pytest.raises(UserError, match="no task 'sum'"):
        make_plan(shared, {"e": experiment(arms=[arm], tasks=["sum"])}, FOLDER, quick=False)
    with pytest.raises(UserError, match="no arm 'b'"):
        make_plan(
            shared, {"e": experiment(arms=[arm], contrasts=[["a", "b"]])}, FOLDER, quick=False
        )
    other = experiment(arms=[arm | {"changes": ["optim.lr=1e-3"]}])
    with pytest.raises(UserError, match="two different arms are called 'a'"):
        make_plan(shared, {"e": experiment(arms=[arm]), "f": other}, FOLDER, quick=False)


def test_quick_leaves_out_what_it_says() -> None:
    arms = [Arm(name=n, label=n, changes=[f"optim.lr={r}"]) for n, r in (("a", 1e-3), ("b", 2e-3))]
    reduced = {"tasks": ["sums"], "seeds": [5], "arms": ["b"]}
    asked = experiment(
        arms=[{"name": a.name, "label": a.label, "changes": a.changes} for a in arms], quick=reduced
    )
    plan = make_plan(load_shared(), {"e": asked}, FOLDER, quick=True)
    assert list(plan.runs) == ["sums-b-s5"]
    without = replace(asked, quick=replace(asked.quick, leave_out=True))
    assert not make_plan(load_shared(), {"e": without}, FOLDER, quick=True).experiments
    assert len(make_plan(load_shared(), {"e": asked}, FOLDER, quick=False).runs) == 2 * 3 * 3
