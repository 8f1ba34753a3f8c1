"""Problems with answers: made by a reasoning_gym task, or from the rows of a file or data set."""

import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from opsd_train.config.errors import UserError, suggest
from opsd_train.config.schema import DataConfig
from opsd_train.data.distinct import Distinct, normal_form
from opsd_train.data.files import shown
from opsd_train.data.rows import texts_from_rows


@dataclass(frozen=True)
class Problem:
    """One problem; `solution` is what only the teacher sees (the answer where there is no more).

    One that a reasoning_gym `task` made keeps the `entry` and settings that its scorer asks for.
    """

    id: str
    question: str
    answer: str
    solution: str
    task: str | None = None
    entry: dict[str, Any] | None = field(default=None, hash=False, repr=False)
    task_config: dict[str, Any] | None = field(default=None, hash=False, repr=False)


def load_problems(config: DataConfig) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, shuffled by data.seed.

    All questions differ, those of rows also without white space, case and Unicode form, so no
    held-out one is trained on. Rows that repeat a question are left out and counted on stderr.
    """
    incomplete: Counter[str] = Counter()
    made = config.source == "reasoning_gym"
    if made:
        source = f"data.task {config.task}"
        problems = _generate(config, config.train_size + config.heldout_size)
    else:
        source = f"data.path {shown(config.path)}"
        problems = problems_from_rows(config, incomplete)
    strata: dict[str | None, list[Problem]] = {a: [] for a in config.balance_over or [None]}
    held = config.heldout_size // len(strata)
    wanted = None if config.train_size is None else config.train_size // len(strata) + held
    if made:  # a task has no end, repeats itself by design, and may ask about letters as they are
        _fill(strata, problems, wanted, Distinct(str))
    else:
        distinct = Distinct(normal_form)
        _fill(strata, problems, None, distinct)
        for line in distinct.lines(source):
            print(line, file=sys.stderr)
    for fault, count in incomplete.items():
        print(f"skipped: rows of {source} with {fault}: {count}", file=sys.stderr)

    rng = random.Random(config.seed)
    train, heldout = [], []
    for answer, stratum in strata.items():
        _check_size(source, answer, len(stratum), held, wanted)
        # Easy questions repeat more often and so come up early; shuffled, both parts get alike.
        rng.shuffle(stratum)
        heldout += stratum[:held]
        train += stratum[held:wanted]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def majority_answer(problems: list[Problem]) -> tuple[str, float]:
    """The most frequent answer and its share: the accuracy of always giving it."""
    answer, count = Counter(problem.answer for problem in problems).most_common(1)[0]
    return answer, count / len(problems)


def _fill(
    strata: dict[str | None, list[Problem]],
    problems: Iterable[Problem],
    size: int | None,
    distinct: Distinct,
) -> None:
    """Puts each new question into its answer's list until every list has `size`; None: all."""
    short = set(strata)
    for problem in problems:
        key = None if None in strata else problem.answer
        if key not in short or not distinct.add(problem.id, problem.question, problem.answer):
            continue
        strata[key].append(problem)
        if len(strata[key]) == size:
            short.remove(key)
            if not short:
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
    """Ids and entries of a reasoning_gym task, enough to find nearly `wanted` distinct questions.

    The same arguments give the same entries. `key` names the settings in error messages.
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


def _generate(config: DataConfig, wanted: int) -> Iterator[Problem]:
    task, registry = config.task, task_registry()
    if task not in registry:
        raise UserError(f"unknown data.task {task!r}{suggest(task, list(registry))}")
    for name, entry in task_entries(task, config.task_config, config.seed, wanted):
        answer = entry["answer"]
        solution = _solution(entry["metadata"], answer)
        made_by = (task, entry, config.task_config)
        yield Problem(name, entry["question"], str(answer), solution, *made_by)


def task_registry() -> dict[str, Any]:
    """The reasoning_gym tasks by name."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("reasoning_gym tasks need: pip install reasoning-gym") from None
    return DATASETS


def _solution(metadata: dict[str, Any], answer: str) -> str:
    """Worked steps where a task has them (gsm_symbolic), an equation where it has an expression."""
    if metadata.get("answer_cot"):
        return str(metadata["answer_cot"])
    expression = metadata.get("expression")
    return f"{expression} = {answer}" if isinstance(expression, str) else str(answer)


def problems_from_rows(config: DataConfig, incomplete: Counter[str]) -> Iterator[Problem]:
    """Problems of the complete rows; the others are an error, or counted by what is wrong."""
    for name, texts in texts_from_rows(config, incomplete):
        yield Problem(name, **texts)
