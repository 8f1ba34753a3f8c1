"""Problems with answers: made by a reasoning_gym task or read from a JSON Lines file."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_train.config import suggest
from opsd_train.errors import UserError
from opsd_train.sections import ColumnsConfig, DataConfig


@dataclass(frozen=True)
class Problem:
    """One problem; `solution` is what only the teacher sees (the answer where there is no more)."""

    id: str
    question: str
    answer: str
    solution: str


def load_problems(config: DataConfig) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems. All questions differ, so no held-out one is trained on."""
    wanted = config.train_size + config.heldout_size
    if config.source == "reasoning_gym":
        source = f"data.task {config.task}"
        problems = _generate(config, wanted)
    else:
        source = f"data.path {config.path}"
        problems = _read(Path(config.path), config.columns)
    strata = {answer: [] for answer in config.balance_over or [None]}
    _fill(strata, problems, wanted // len(strata))

    rng = random.Random(config.seed)
    train, heldout = [], []
    for answer, stratum in strata.items():
        if len(stratum) < wanted // len(strata):
            raise UserError(
                f"{source} gives {len(stratum)} distinct problems"
                f"{'' if answer is None else f' with answer {answer!r}'}, but data.train_size + "
                f"data.heldout_size asks for {wanted // len(strata)}"
            )
        # Easy questions repeat more often and so come up early; shuffled, both parts get alike.
        rng.shuffle(stratum)
        cut = config.heldout_size // len(strata)
        heldout += stratum[:cut]
        train += stratum[cut:]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def majority_answer(problems: list[Problem]) -> tuple[str, float]:
    """The most frequent answer and its share: the accuracy of always giving it."""
    answer, count = Counter(problem.answer for problem in problems).most_common(1)[0]
    return answer, count / len(problems)


def _fill(strata: dict[str | None, list[Problem]], problems: Iterable[Problem], size: int) -> None:
    """Puts each new question into its answer's list until every list has `size`."""
    seen = set()
    short = set(strata)
    for problem in problems:
        key = None if None in strata else problem.answer
        if key not in short or problem.question in seen:
            continue
        seen.add(problem.question)
        strata[key].append(problem)
        if len(strata[key]) == size:
            short.remove(key)
            if not short:
                return


def _generate(config: DataConfig, wanted: int) -> Iterator[Problem]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("data.source=reasoning_gym needs: pip install reasoning-gym") from None
    task = config.task
    if task not in DATASETS:
        raise UserError(f"unknown data.task {task!r}{suggest(task, list(DATASETS))}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for key in config.task_config:
        if key not in known or key in ("seed", "size"):
            raise UserError(f"unknown key data.task_config.{key}{suggest(key, known)}")
    # A task with few distinct problems repeats itself; this many draws find nearly all of them.
    draws = 50 * wanted + 1000
    try:
        dataset = reasoning_gym.create_dataset(
            task, size=draws, seed=config.seed, **config.task_config
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"data.task_config does not suit {task}: {error}") from None
    for index in range(draws):
        entry = dataset[index]
        answer = entry["answer"]
        if answer is None:
            raise UserError(f"data.task {task} gives no answers, so nothing can be checked")
        yield Problem(
            f"{task}-{index}", entry["question"], str(answer), _solution(entry["metadata"], answer)
        )


def _solution(metadata: dict[str, Any], answer: str) -> str:
    """Worked steps where a task has them (gsm_symbolic), an equation where it has an expression."""
    if metadata.get("answer_cot"):
        return str(metadata["answer_cot"])
    expression = metadata.get("expression")
    return f"{expression} = {answer}" if isinstance(expression, str) else str(answer)


def _read(path: Path, columns: ColumnsConfig) -> Iterator[Problem]:
    try:
        # Not splitlines(): JSON text may hold U+2028 and its like unescaped.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read data.path {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"data.path {path} is not UTF-8 text") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"data.path {path} is empty")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _problem(f"{path.stem}-{number}", f"{path}, line {number}", line, columns)


def _problem(name: str, place: str, line: str, columns: ColumnsConfig) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with columns, got {type(row).__name__}")
    named = dataclasses.asdict(columns)
    if columns.solution is None:
        named["solution"] = columns.answer
    return Problem(name, **{role: _cell(row, role, named[role], place) for role in named})


def _cell(row: dict[str, Any], role: str, column: str, place: str) -> str:
    if column not in row:
        or_null = " (null: show the teacher the answer)" if role == "solution" else ""
        raise UserError(
            f"{place}: there is no column {column!r}, only {', '.join(map(repr, row))}; "
            f"set data.columns.{role}{or_null}"
        )
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise UserError(f"{place}: column {column!r} should be text or a number, got {value!r}")
    return str(value)
