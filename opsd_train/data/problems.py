"""Problems with answers, from a reasoning_gym task or from the rows of a file or data set."""

import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsd_train.config.errors import UserError, suggest
from opsd_train.config.schema import DataConfig
from opsd_train.data.distinct import DuplicateFilter, normal_form
from opsd_train.data.files import data_path, shorten_path
from opsd_train.data.rows import texts_from_rows


@dataclass(frozen=True)
class Problem:
    """One problem. `solution` is the reference that only the teacher sees; it may be the answer.

    `teacher` is the name of its teacher in distill.teachers; None where there is one teacher.
    A problem of a reasoning_gym `task` keeps the `entry` and settings that the task's scorer needs.
    """

    id: str
    question: str
    answer: str
    solution: str
    task: str | None = None
    entry: dict[str, Any] | None = field(default=None, hash=False, repr=False)
    task_config: dict[str, Any] | None = field(default=None, hash=False, repr=False)
    teacher: str | None = None


def load_problems(config: DataConfig) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, shuffled with data.seed.

    All questions differ, so no held-out problem is trained on; questions from rows are compared in
    their `normal_form`. Rows that repeat a question or are incomplete are skipped, with a count on
    stderr. Raises UserError if the source cannot be read or has too few distinct problems.
    """
    incomplete: Counter[str] = Counter()
    answers: Sequence[str | None] = config.balance_over or (None,)
    strata: dict[str | None, list[Problem]] = {answer: [] for answer in answers}
    held = config.heldout_size // len(strata)
    wanted = None if config.train_size is None else config.train_size // len(strata) + held
    if config.source == "reasoning_gym":
        source = f"data.task {config.task}"
        # A task is endless, repeats itself by design, and may ask about upper and lower case.
        _fill(strata, _generate(config), wanted, DuplicateFilter(str))
    else:
        source = f"data.path {shorten_path(data_path(config))}"
        duplicates = DuplicateFilter(normal_form)
        _fill(strata, problems_from_rows(config, incomplete), None, duplicates)
        for line in duplicates.lines(source):
            print(line, file=sys.stderr)
    for fault, count in incomplete.items():
        print(f"skipped: rows of {source} with {fault}: {count}", file=sys.stderr)

    rng = random.Random(config.seed)
    train: list[Problem] = []
    heldout: list[Problem] = []
    for answer, stratum in strata.items():
        _check_size(source, answer, len(stratum), held, wanted)
        # Shuffle before the split: easy questions repeat more often, so they come early.
        rng.shuffle(stratum)
        heldout += stratum[:held]
        train += stratum[held:wanted]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def majority_answer(problems: list[Problem]) -> tuple[str, float]:
    """The most frequent answer and its fraction, the accuracy of always giving that answer."""
    answer, count = Counter(problem.answer for problem in problems).most_common(1)[0]
    return answer, count / len(problems)


def _fill(
    strata: dict[str | None, list[Problem]],
    problems: Iterable[Problem],
    size: int | None,
    duplicates: DuplicateFilter,
) -> None:
    """Append each new question to its answer's stratum until each has `size`; None: no limit."""
    unfilled = set(strata)
    for problem in problems:
        key = None if None in strata else problem.answer
        if key not in unfilled or not duplicates.add(problem.id, problem.question, problem.answer):
            continue
        strata[key].append(problem)
        if len(strata[key]) == size:
            unfilled.remove(key)
            if not unfilled:
                return


def _check_size(source: str, answer: str | None, size: int, held: int, wanted: int | None) -> None:
    found = f"{source} gives {size} distinct problems"
    if answer is not None:
        found += f" with answer {answer!r}"
    if wanted is None and size <= held:
        raise UserError(f"{found}; data.heldout_size={held} leaves none to train on")
    if wanted is not None and size < wanted:
        raise UserError(f"{found}, but data.train_size + data.heldout_size asks for {wanted}")


def task_entries(
    task: str, settings: dict[str, Any], seed: int, wanted: int, key: str = "data.task_config"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and entries of a reasoning_gym task, enough for about `wanted` distinct questions.

    The same arguments give the same entries. `key` names the settings in error messages. Raises
    UserError for settings that the task does not accept, and for a task without answers.
    """
    known = [field.name for field in dataclasses.fields(task_registry()[task][1])]
    from reasoning_gym import create_dataset

    for name in settings:
        if name not in known or name in ("seed", "size"):
            raise UserError(f"unknown key {key}.{name}{suggest(name, known)}")
    # A task with few distinct problems repeats itself; this many draws find nearly all of them.
    draws = 50 * wanted + 1000
    try:
        dataset = create_dataset(task, size=draws, seed=seed, **settings)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"{key} does not suit {task}: {error}") from None
    for index in range(draws):
        entry = dataset[index]
        if entry["answer"] is None:
            raise UserError(f"task {task} gives no answers, so nothing can be checked")
        yield f"{task}-{index}", entry


def _generate(config: DataConfig) -> Iterator[Problem]:
    """Problems of the reasoning_gym task; repeats some of them."""
    task, registry = config.task, task_registry()
    assert task is not None and config.train_size is not None  # DataConfig requires both
    if task not in registry:
        raise UserError(f"unknown data.task {task!r}{suggest(task, list(registry))}")
    wanted = config.train_size + config.heldout_size
    for name, entry in task_entries(task, config.task_config, config.seed, wanted):
        answer = entry["answer"]
        solution = _solution(entry["metadata"], answer)
        origin = (task, entry, config.task_config)
        yield Problem(name, entry["question"], str(answer), solution, *origin)


def task_registry() -> dict[str, Any]:
    """The tasks of reasoning_gym by name: (dataset class, config class). Needs the package."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("reasoning_gym tasks need: pip install reasoning-gym") from None
    return DATASETS


def _solution(metadata: dict[str, Any], answer: str) -> str:
    """The task's worked steps (gsm_symbolic), or "expression = answer", or the answer alone."""
    if metadata.get("answer_cot"):
        return str(metadata["answer_cot"])
    expression = metadata.get("expression")
    return f"{expression} = {answer}" if isinstance(expression, str) else str(answer)


def problems_from_rows(config: DataConfig, incomplete: Counter[str]) -> Iterator[Problem]:
    """Problems of the complete rows; see `texts_from_rows` for the others."""
    for name, texts in texts_from_rows(config, incomplete):
        own = (texts["question"], texts["answer"], texts["solution"])
        yield Problem(name, *own, teacher=texts.get("teacher"))
