"""Plan the runs that the study's recipes need; experiments share runs with the same settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.study.settings import Arm, Experiment, Sampling, Shared, Size
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe, to_yaml
from opsd_train.config.schema import Config


@dataclass(frozen=True)
class PlannedRun:
    """One training run: the base recipe with `changes`."""

    id: str
    task: str
    arm: str
    seed: int
    recipe: str
    changes: tuple[str, ...]
    config: Config
    start: str  # id of the run that evaluates the model this one starts from

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)

    @property
    def words(self) -> list[str]:
        """The command's arguments after `python -m opsd_train`."""
        return [self.recipe, *self.changes, f"output_dir={self.folder}"]


@dataclass(frozen=True)
class PlannedSampling:
    """Several completions of every held-out problem of a run, under its prompts."""

    id: str
    task: str
    seed: int
    folder: Path
    run: str | None  # id of the run whose weights are used; None: the base model's
    problems_of: str  # id of the run whose held-out problems are used
    problems_folder: Path
    sampling: Sampling

    def words(self, base: str) -> list[str]:
        """The command's arguments after `python -m opsd_train`; `base` is the base model's name."""
        sampling = self.sampling
        return [
            *("eval", base if self.run is None else str(self.problems_folder)),
            *("--recipe", "demo/eval", "--set", str(self.problems_folder)),
            f"sampling.samples={sampling.samples}",
            f"sampling.max_new_tokens={sampling.max_new_tokens}",
            f"sampling.temperature={sampling.temperature}",
            f"output_dir={self.folder}",
        ]


@dataclass
class PlannedExperiment:
    """An experiment with the runs and samplings it needs: arm -> task -> ids, one per seed."""

    name: str
    experiment: Experiment
    tasks: list[str]
    runs: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    samplings: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def ids(self) -> set[str]:
        """Ids of all runs and samplings it needs."""
        both = [*self.runs.values(), *self.samplings.values()]
        return {name for tasks in both for names in tasks.values() for name in names}


@dataclass
class Plan:
    """Everything to run, in order."""

    folder: Path
    size: Size
    labels: dict[str, str]  # of the tasks
    runs: dict[str, PlannedRun] = field(default_factory=dict)
    samplings: dict[str, PlannedSampling] = field(default_factory=dict)
    experiments: list[PlannedExperiment] = field(default_factory=list)

    def needed(self, experiments: Iterable[PlannedExperiment]) -> set[str]:
        """Ids of their runs and samplings, and of the runs that evaluate the initial models."""
        ids = {name for planned in experiments for name in planned.ids}
        return ids | {self.runs[name].start for name in ids & self.runs.keys()}


def fingerprint(config: Config) -> str:
    """Equal for runs that train alike: the recipe without output_dir and extra evaluations."""
    evaluation = replace(config.evaluation, at_start=False, teacher=False)
    return to_yaml(replace(config, output_dir="", evaluation=evaluation))


def make_plan(
    shared: Shared, experiments: dict[str, Experiment], folder: Path, *, quick: bool
) -> Plan:
    """Plan the whole study. Raises UserError if an experiment names an unknown task or arm."""
    labels = {name: task.label for name, task in shared.tasks.items()}
    plan = Plan(folder, shared.quick if quick else shared.full, labels)
    known: dict[str, str] = {}  # fingerprint -> id
    for name, experiment in experiments.items():
        reduced = experiment.quick if quick else None
        if reduced and reduced.leave_out:
            continue
        tasks = (reduced and reduced.tasks) or experiment.tasks or list(shared.tasks)
        seeds = (reduced and reduced.seeds) or experiment.seeds or plan.size.seeds
        arms = [arm for arm in experiment.arms if _kept(arm, reduced and reduced.arms)]
        _check(name, experiment, tasks, shared)
        planned = PlannedExperiment(name, replace(experiment, arms=arms), tasks)
        for task in tasks:
            for seed in seeds:
                for arm in arms:
                    if not arm.base_model:
                        whole = replace(arm, changes=[*experiment.changes, *arm.changes])
                        run = _run(plan, shared, task, whole, seed, known)
                        planned.runs.setdefault(arm.name, {}).setdefault(task, []).append(run.id)
            if experiment.sampling:
                _sample(plan, planned, task, seeds[0], experiment.sampling)
        plan.experiments.append(planned)
    _share_starts(plan)
    return plan


def _kept(arm: Arm, names: list[str] | None) -> bool:
    return names is None or arm.base_model or arm.name in names


def _run(
    plan: Plan, shared: Shared, task: str, arm: Arm, seed: int, known: dict[str, str]
) -> PlannedRun:
    """The arm's run, or an earlier experiment's run with the same settings."""
    sizes = [*plan.size.changes, *shared.tasks[task].changes]
    changes = (*sizes, *arm.changes, f"seed={seed}")
    name = f"{task}-{arm.name}-s{seed}"
    where = f"output_dir={plan.folder / 'runs' / name}"
    config = config_from(load_recipe(shared.recipe), [*changes, where])
    key = fingerprint(config)
    if key not in known:
        if name in plan.runs:
            raise UserError(f"study: two different arms are called {arm.name!r} on task {task}")
        known[key] = name
        plan.runs[name] = PlannedRun(
            name, task, arm.name, seed, shared.recipe, changes, config, name
        )
    return plan.runs[known[key]]


def _sample(
    plan: Plan, planned: PlannedExperiment, task: str, seed: int, sampling: Sampling
) -> None:
    """Plan a sampling of each arm's model of this seed, and of the base model."""
    trained = {arm: ids[task][0] for arm, ids in planned.runs.items()}
    for arm in planned.experiment.arms:
        run = trained.get(arm.name)
        asked = run or next(iter(trained.values()))
        name = f"{planned.name}-{run or f'{task}-{arm.name}'}"
        folders = plan.folder / "samplings" / name, plan.runs[asked].folder
        plan.samplings[name] = PlannedSampling(
            name, task, seed, folders[0], run, asked, folders[1], sampling
        )
        planned.samplings.setdefault(arm.name, {}).setdefault(task, []).append(name)


def _share_starts(plan: Plan) -> None:
    """Let one run, OPSD's if there is one, evaluate the initial model for all runs from it."""
    starts: dict[str, PlannedRun] = {}
    for run in sorted(plan.runs.values(), key=lambda run: run.config.method != "opsd"):
        starts.setdefault(_start(run.config), run)
    for name, run in plan.runs.items():
        start = starts[_start(run.config)].id
        first = name == start
        # A teacher's prompt that is made after a rollout has none on held-out problems.
        teacher = first and not run.config.prompts.teacher_context
        words = (
            f"evaluation.at_start={str(first).lower()}",
            f"evaluation.teacher={str(teacher).lower()}",
        )
        evaluation = replace(run.config.evaluation, at_start=first, teacher=teacher)
        config = replace(run.config, evaluation=evaluation)
        plan.runs[name] = replace(run, changes=(*run.changes, *words), config=config, start=start)


def _start(config: Config) -> str:
    """What the evaluation before training depends on; new adapters change nothing."""
    parts = config.model, config.data, config.prompts, config.evaluation
    return json.dumps([asdict(part) for part in parts])


def _check(name: str, experiment: Experiment, tasks: list[str], shared: Shared) -> None:
    for task in tasks:
        if task not in shared.tasks:
            raise UserError(f"study/{name}: there is no task {task!r} in study/shared")
    arms = {arm.name for arm in experiment.arms}
    for arm in _named(experiment):
        if arm not in arms:
            raise UserError(f"study/{name}: there is no arm {arm!r}")


def _named(experiment: Experiment) -> Iterator[str]:
    for pair in (*experiment.contrasts, *experiment.paper_ahead):
        yield from pair
    yield from experiment.quick.arms or ()
