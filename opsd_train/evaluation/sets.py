"""The problems that --set names: hub data sets, tasks, files, a run's held-out problems."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from opsd_train.config.errors import UserError, suggest
from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import ColumnsConfig, Config, DataConfig
from opsd_train.data.files import is_data_file
from opsd_train.data.fingerprint import difference, fingerprint, recorded_fingerprint
from opsd_train.data.problems import (
    load_problems,
    problems_from_rows,
    task_entries,
    task_registry,
)
from opsd_train.data.seeds import stable_seed
from opsd_train.evaluation.settings import EvalConfig, FileColumnsConfig

HELDOUT = "heldout"


@dataclass(frozen=True)
class EvalProblem:
    """A problem of a set; see `grading.Answer` for `task`, `entry` and `task_config`."""

    set: str
    """As problems.jsonl calls it: see `set_label`."""
    problem: str
    """The problem's id in its set."""
    question: str
    answer: str
    task: str | None = None
    entry: dict[str, Any] | None = field(default=None, hash=False)
    task_config: dict[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face hub, and its columns; the answer's is `answer`."""

    path: str
    split: str
    question: str
    type: str | None = None
    """Column whose rows with "description" are left out: no parser can grade their answers."""
    note: str = ""
    """Shown beside the scores."""


# Names and columns as on the data sets' cards; all have a column `answer`.
HUB = {
    "aime24": HubSet("HuggingFaceH4/aime_2024", "train", "problem"),
    "aime25": HubSet("MathArena/aime_2025", "train", "problem"),
    "hmmt25": HubSet("MathArena/hmmt_feb_2025", "train", "problem"),
    # answer_type is number, set, variable or description (grading.py of meituan-longcat/AMO-Bench
    # asks a language model about the last kind: 11 of 50). Answers stand in \boxed{}.
    "amo-bench": HubSet(
        "meituan-longcat/AMO-Bench",
        "test",
        "prompt",
        type="answer_type",
        note="the problems whose answers a parser can grade, 39 of its 50",
    ),
    "math-500": HubSet("HuggingFaceH4/MATH-500", "test", "problem"),
}


def load_set(name: str, config: EvalConfig, run: Config | None) -> list[EvalProblem]:
    """The problems that --set `name` means; `run` is the recipe of the run that is evaluated.

    Raises UserError for an unknown set, data that has changed since the run, and a task that
    cannot give so many problems or whose scorer rejects its own answer.
    """
    problems: Iterable[EvalProblem]
    if name in HUB:
        problems = _hub(name, HUB[name])
    elif is_heldout(name):
        recipe = recipe_of(name, run)
        folder = Path(recipe.output_dir if name == HELDOUT else name)
        return list(islice(_heldout(recipe, folder), config.problems))
    elif is_data_file(name):
        problems = _file(name, config.columns)
    elif name in task_registry():
        problems = _task(name, config.tasks.get(name, {}), config.problems or config.task_problems)
    else:
        near = suggest(name, [HELDOUT, *HUB, *task_registry()])
        raise UserError(
            f"unknown --set {name!r}{near}; there are {', '.join([*HUB, HELDOUT])}, a run's "
            "folder, reasoning_gym tasks, and .jsonl, .json, .csv or .parquet files"
        )
    return list(islice(problems, config.problems))


def set_label(name: str) -> str:
    """The set's name in problems.jsonl: "heldout" for the folder of a run, else `name`."""
    return HELDOUT if is_heldout(name) else name


def is_heldout(name: str) -> bool:
    """Whether --set `name` means held-out problems: "heldout", or the folder of a run."""
    return name == HELDOUT or (Path(name) / "config.yaml").is_file()


def recipe_of(name: str, run: Config | None) -> Config:
    """The recipe of the run whose held-out problems --set `name` means.

    `run` is that of the run that is evaluated; raises UserError for "heldout" without one.
    """
    if name != HELDOUT:
        return config_from(load_recipe(str(Path(name) / "config.yaml")))
    if run is None:
        raise UserError(
            "--set heldout means the held-out problems of a run, and this is a model; name a run's "
            "folder there instead"
        )
    return run


def _hub(name: str, place: HubSet) -> Iterator[EvalProblem]:
    # The reader takes three columns; the type, where there is one, is read as the third.
    columns = ColumnsConfig(question=place.question, answer="answer", solution=place.type)
    data = _data("hub", path=place.path, split=place.split, columns=columns)
    for problem in problems_from_rows(data, Counter()):
        if place.type is None or problem.solution != "description":
            yield EvalProblem(name, problem.id, problem.question, _unboxed(problem.answer))


def _file(path: str, columns: FileColumnsConfig) -> Iterator[EvalProblem]:
    named = ColumnsConfig(question=columns.question, answer=columns.answer, solution=None)
    data = _data("file", path=path, columns=named)
    for problem in problems_from_rows(data, Counter()):
        yield EvalProblem(path, problem.id, problem.question, problem.answer)


def _task(task: str, settings: dict[str, Any], count: int) -> list[EvalProblem]:
    # Another seed than training recipes have: theirs would draw the problems trained on.
    seed = stable_seed("evaluation", task)
    made: dict[str, EvalProblem] = {}  # by question
    for name, entry in task_entries(task, settings, seed, count, f"tasks.{task}"):
        question = entry["question"]
        made.setdefault(question, _of_entry(task, task, name, entry, settings))
        if len(made) == 1:
            _check_scorer(task, made[question])
        if len(made) == count:
            return list(made.values())
    raise UserError(
        f"--set {task} gives {len(made)} distinct problems, not {count}; lower problems (or "
        f"task_problems) to {len(made)}"
    )


def _heldout(config: Config, folder: Path) -> Iterator[EvalProblem]:
    """The problems that training evaluates, or all if it evaluates none; `folder`: the run's."""
    train, problems = load_problems(config.data)
    for checkpoint in sorted((folder / "checkpoints").glob("step_*[0-9]"))[-1:]:
        old = recorded_fingerprint(checkpoint)
        if old and (changed := difference(old, fingerprint(train, problems), checkpoint)):
            raise UserError(f"--set heldout: {changed}; restore it")
    if not problems:
        raise UserError("--set heldout: the run held no problems out (data.heldout_size=0)")
    for problem in problems[: config.evaluation.problems or None]:
        if problem.task is not None and problem.entry is not None:
            made_by = problem.task_config
            yield _of_entry(HELDOUT, problem.task, problem.id, problem.entry, made_by)
        else:
            yield EvalProblem(HELDOUT, problem.id, problem.question, problem.answer)


def _of_entry(
    label: str, task: str, name: str, entry: dict[str, Any], settings: dict[str, Any] | None
) -> EvalProblem:
    kept = {key: value for key, value in entry["metadata"].items() if _is_json(value)}
    entry = {"question": entry["question"], "answer": entry["answer"], "metadata": kept}
    answer = str(entry["answer"])
    return EvalProblem(label, name, entry["question"], answer, task, entry, settings)


def _check_scorer(task: str, problem: EvalProblem) -> None:
    """Raises UserError for scorers (arc_agi, rearc) that need tuples: JSON has only lists."""
    from opsd_train.evaluation.answers import check_by_task

    entry = json.loads(json.dumps(problem.entry))
    if not check_by_task(problem.answer, problem.answer, task, entry, problem.task_config)[0]:
        raise UserError(
            f"--set {task}: the task's scorer does not take the task's own answer once its problem "
            "has been kept as JSON, so it cannot be evaluated here"
        )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _data(source: Literal["file", "hub"], **options: Any) -> DataConfig:
    return DataConfig(source=source, train_size=None, heldout_size=0, **options)


def _unboxed(answer: str) -> str:
    inner = answer.strip()
    if inner.startswith(r"\boxed{") and inner.endswith("}"):
        return inner.removeprefix(r"\boxed{")[:-1]
    return answer
