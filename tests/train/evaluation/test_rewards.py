"""Training's answer check: verdicts checked by hand, the same in an evaluation, beside the step."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from opsd_train import run
from opsd_train import trainer as training
from opsd_train.config.schema import DataConfig
from opsd_train.data.problems import Problem, load_problems
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation import evaluate as evaluation
from opsd_train.evaluation import workers
from opsd_train.evaluation.grading import Grade, Grader, grade_one
from opsd_train.evaluation.rewards import Rewards, answer_of, failures, grading_processes
from opsd_train.evaluation.sets import EvalProblem
from opsd_train.evaluation.settings import GradingConfig
from opsd_train.evaluation.store import GenerationFile, Store
from opsd_train.methods import METHODS
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.trainer import Trainer
from tests.helpers.course import rows
from tests.helpers.method_cases import GRPO
from tests.helpers.tiny import config, make_tokenizer
from tests.helpers.verdicts import Verdicts

MINUS = "\u2212"

RIGHT = [  # (expected, completion)
    ("5", "5"),
    ("5", "I add them.\n5."),
    ("5", "It is 5!"),
    ("5", r"\boxed{5.0}"),
    ("5", "+5"),
    ("5", "**5**"),
    ("5", "The answer is (5)."),
    ("5", "x = 5"),
    ("5", r"\boxed{x=5}"),
    ("5", "5 km"),
    ("5", r"$5\text{ cm}$"),
    ("84", "58 + 26 = 84"),
    ("84", "The sum of 58 and 26 is 84."),
    ("84", "The answer is 58 + 26 = **84**. I have used 2 numbers."),
    ("-5", " - 5 "),
    ("-4", "3 - 7 = -4"),
    ("-3", f"7 - 10 = {MINUS}3"),
    ("-3", f"$7 - 10 = {MINUS}3$"),
    ("-3", "= \u2013 3"),
    ("-3", rf"\boxed{{{MINUS}3}}"),
    ("4", "in all - 4"),
    ("4", "It is 4 - a square."),
    ("-31", "The answer is -31."),
    ("1234567", "1,234,567"),
    ("1234567", r"$1\,234\,567$"),
    ("1234567", "1\u202f234\u202f567"),
    ("1,234", "1234"),
    ("12.5", "$12.50"),
    ("0.5", r"\boxed{1/2}"),
    ("0.1", "1/10"),
    ("1/2", r"\boxed{\frac{1}{2}}"),
    (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac{2}{3}", r"It is $\frac{2}{3}$"),
    (r"-\frac{1}{2}", r"So $x = -\frac12$"),
    ("3/2", "1 1/2"),
    ("1000", "1e3"),
    ("2000", r"about $2 \times 10^{3}$"),
    ("0.02", "2e-2"),
    ("9", "it is $3^2$"),
    (r"\sqrt{8}", r"so $2\sqrt{2}$"),
    ("90", r"\boxed{90^\circ}"),
    ("90", r"an angle of $90^\circ$"),
    ("90", "90\u00b0"),
    ("5", r"\boxed{5\%}"),
    ("C", r"\boxed{\text{C}}"),
    ("5", r"\boxed{4} no, \boxed{ 5 }"),
    ("5", r"<think>\boxed{4}</think> It is 5"),
    ("5", r"<think>so \boxed{5}, or"),
    ("Friday", "friday."),
    ("Friday", "Answer: **Friday**"),
    ("mother-in-law", "**Mother-in-law**"),
    ("yes", '"Yes."'),
    ("1, 2, 3", "1,2,3"),
    ("x + 1", "x+1"),
    ("0 0 0 1 0 3", "They are:\n0 0 0 1 0 3"),
    ("0 0 0 1 0 3", r"\boxed{0 0 0 1 0 3}"),
    ("2 1\n1 2", "The grid:\n\n```\n2 1\n1 2\n```\n"),
    ("2 1\n1 2", "\\boxed{2 1\n1 2}"),
    ("up up left", "up up left"),
    ("3:45", "3:45"),
    ("0x1F", "0x1f"),
]

WRONG = [
    ("5", "6"),
    ("5", ""),
    ("5", "5\nor 6"),
    ("5", r"\boxed{6} 5"),
    ("5", "55"),
    ("5", "9" * 5000),
    ("5", r"It is \boxed{5"),
    ("5", r"\boxed{5}, no, \boxed{4}"),
    ("5", r"<think>\boxed{5}? no</think> It is 4"),
    ("5", r"<think>\boxed{5}</think>"),
    ("5", "<think>5</think>\n"),
    ("3", f"7 - 10 = {MINUS}3"),
    ("3", "7 - 10 = \u20133"),
    ("3", "It is 7 - 3"),
    ("3", "It is 7-3"),
    ("3", "f(2)-3"),
    ("3", "2 + 3"),
    ("3", r"2 \times 3"),
    ("3", r"It is $\frac{2}{3}$"),
    ("2", r"It is $\frac{2}{3}$"),
    ("3", "2/3"),
    ("2", r"so $\sqrt{2}$"),
    ("2", "so \u221a2"),
    ("2", "it is $3^2$"),
    ("2", "it is 3^2"),
    ("2", "3**2"),
    ("3", "3^2"),
    ("3", "3\u00b2"),
    ("32", "3\u00b2"),
    ("5", "$5!$"),
    ("1", "1\u00bd"),
    ("2", "2x + 1"),
    ("2", r"2\pi"),
    ("1", "1e3"),
    ("3", "1e3"),
    ("3", r"2 \times 10^3"),
    ("3", "at 3:45"),
    ("45", "at 3:45"),
    ("3", "(2, 3)"),
    ("3", "1, 2, 3"),
    ("0.0", "-3.6, 0.0"),
    ("1234", "12,34"),
    ("234", "1,234"),
    ("1", "1/0"),
    ("0.3333", "1/3"),
    ("500", r"5\%"),
    ("90", r"$45^\circ$"),
    ("19", "COVID-19"),
    ("Friday", "Sunday"),
    ("Friday", "Not Friday"),
    ("1,2", "12"),
    ("103", "0 0 0 1 0 3"),
    ("3", "0 0 0 1 0 3"),
    ("0 0 0 1 0 3", "103"),
    ("0 0 0 1 0 3", "0 0 0 1 3 0"),
    ("0 0 0 1 0 3", r"\boxed{4}"),
    ("1 2 3", "6"),
    ("2 3", r"\boxed{3 2}"),
    ("2 1\n1 2", "1 2\n2 1"),
    ("2 1\n1 2", "2 1 1 2"),
    ("2 1\n1 2", r"\boxed{6}"),
    ("up up left", "left up up"),
    ("3:45", "3:46"),
    ("00:34:28", "00:12:01"),
    ("0x1F", "0x2F"),
]

TASKS = [  # (task, settings, expected, completion, right)
    ("chain_sum", {}, "84", "58 + 26", False),  # not worked out
    ("chain_sum", {}, "84", r"\boxed{58 + 26}", False),
    ("chain_sum", {}, "84", "58 + 26 = 84", True),
    ("chain_sum", {}, "-3", f"7 - 10 = {MINUS}3", True),
    ("chain_sum", {}, "3", f"7 - 10 = {MINUS}3", False),
    ("chain_sum", {}, "3", r"$\frac{2}{3}$", False),
    ("chain_sum", {}, "1234", r"\boxed{1,234.0}", True),
    ("chain_sum", {}, "84", r"\boxed{84\text{ apples}}", True),
    ("chain_sum", {}, "84", r"\boxed{x = 84}", True),
    ("chain_sum", {}, "84", r"\boxed{83 \text{ or } 84}", False),
    ("chain_sum", {}, "84", r"\boxed{{84}}", True),
    ("fraction_simplification", {}, "2/3", r"\boxed{\frac{2}{3}}", True),
    ("fraction_simplification", {}, "2/3", r"\boxed{4/6}", False),
    ("spell_backward", {}, "ainomma", "ammonia", False),
    ("puzzle24", {}, "6*4*1*1", "1*1*4*6", True),
    ("puzzle24", {"max_value": 5}, "6*4*1*1", "1*1*4*6", False),  # scored by the run's own settings
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    made = Grader(seconds=60, workers=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def in_training(grader: Grader) -> dict[tuple[str, str], Grade]:
    """(expected, completion) -> grade, from token ids as a step has them."""
    pairs, tokenizer = RIGHT + WRONG, make_tokenizer()
    tokens = [tokenizer.encode(text, add_special_tokens=False) for _, text in pairs]
    problems = [Problem("p", "q", expected, expected) for expected, _ in pairs]
    rewards = Rewards(grader, tokenizer, DistributedContext(torch.device("cpu")))
    grades = rewards.collect(rewards.submit(problems, tokens))
    assert all(grade.reason is None for grade in grades)
    return dict(zip(pairs, grades, strict=True))


@pytest.mark.parametrize(("expected", "text"), RIGHT)
def test_right(in_training, expected: str, text: str) -> None:
    assert in_training[expected, text].correct


@pytest.mark.parametrize(("expected", "text"), WRONG)
def test_wrong(in_training, expected: str, text: str) -> None:
    assert not in_training[expected, text].correct


def test_an_evaluation_says_the_same(in_training, tmp_path, monkeypatch, grader) -> None:
    """From the texts of generations.jsonl to grades.jsonl."""
    monkeypatch.setattr(evaluation, "grade", lambda a, **_: grader.submit(a).result())
    store, pairs = Store(tmp_path), list(in_training)
    problems = [EvalProblem("s", f"{i:03}", "q", expected) for i, (expected, _) in enumerate(pairs)]
    store._write("problems.jsonl", [vars(problem) for problem in problems])
    made = {"set": "s", "sample": 0, "prompt_tokens": 1, "tokens": 1, "finished": True}
    with GenerationFile(tmp_path, 0, 1) as file:
        file.append([made | {"problem": f"{i:03}", "text": t} for i, (_, t) in enumerate(pairs)])
    evaluation.score(store, GradingConfig())
    found = [Grade(r["correct"], r["answer"], r["boxed"], r["reason"]) for r in store.grades()]
    assert found == list(in_training.values())


def is_correct(problem: Problem, text: str) -> bool:
    return grade_one(answer_of(problem, text)).correct


@pytest.mark.parametrize(("task", "settings", "expected", "text", "right"), TASKS)
def test_a_tasks_own_scorer(task, settings, expected, text, right) -> None:
    numbers = {"numbers": [6, 4], "numerator": 4, "denominator": 6}
    metadata = {"simplified_numerator": 2, "simplified_denominator": 3, **numbers}
    entry = {"question": "", "answer": expected, "metadata": metadata}
    problem = Problem("p", "", expected, expected, task, entry, settings)
    assert is_correct(problem, text) == right


def test_any_right_expression_is_right() -> None:
    """What a recipe's problems carry is what the scorer asks for."""
    data = DataConfig(source="reasoning_gym", task="countdown", train_size=1, heldout_size=1)
    (problem,), _ = load_problems(data)
    first, _, rest = problem.answer.partition(" ")
    assert is_correct(problem, problem.answer)
    assert is_correct(problem, rf"\boxed{{({problem.answer}) * 1}}") is False  # a number of its own
    assert is_correct(problem, f"({first}) {rest}")
    assert not is_correct(problem, first)


# --------------------------------------------------------------------------------- beside the step


class Noting(Verdicts):
    """Notes when grading begins and when it is waited for."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(lambda answer: len(answer.text) % 2 == 0)
        self.events = events

    def submit(self, answers):
        self.events.append("submit")
        result = super().submit(answers).result

        def waited() -> list[Grade]:
            self.events.append("wait")
            return result()

        return SimpleNamespace(result=waited)


NEEDS = {
    "opsd": ((), False),
    "opsd, weighed": (("opsd.verify_weight={correct: 1.0, wrong: 0.5}",), True),
    "grpo": ((*GRPO, "updates_per_step=2"), True),
    "star": (("method=star",), True),
    "context_distill": (("method=context_distill",), False),
    "sft": (("method=sft",), None),
}


@pytest.mark.parametrize("name", NEEDS)
def test_grading_goes_on_beside_the_step(name, tiny_folder, tmp_path, monkeypatch) -> None:
    """Waited for before the weights where they need it, else after the last update."""
    overrides, early = NEEDS[name]
    events: list[str] = []
    made = config(tiny_folder, tmp_path, *overrides)
    context = DistributedContext(torch.device("cpu"))
    monkeypatch.setattr(training, "Grader", lambda **_: Noting(events))
    trainer = Trainer(made, context, RunFolder(tmp_path, context), PhaseTimer(), "full")
    assign_weights = trainer.method.assign_weights
    monkeypatch.setattr(
        trainer.method,
        "assign_weights",
        lambda s: [events.append("assign_weights"), assign_weights(s)][1],
    )
    trainer.optimizer.register_step_post_hook(lambda *_: events.append("update"))
    monkeypatch.setattr(trainer.order, "observe", lambda found: events.append(len(found)))
    row, stats = trainer.step(1)
    count = 4 * made.rollout.samples_per_prompt
    updates = ["update"] * made.updates_per_step
    if early is None:
        assert events == ["assign_weights", *updates] and "accuracy" not in row
        return
    before, after = ["submit"], ["wait", count]
    whole = [*after, "assign_weights", *updates] if early else ["assign_weights", *updates, *after]
    assert events == before + whole
    assert row["failed_checks"] == 0 and row["seconds_grading"] >= 0
    shown = stats.sample_rows(trainer.tokenizer, 9)
    assert all(r["correct"] == (len(r["completion"]) % 2 == 0) for r in shown)
    assert all(r["extracted"] == r["completion"] for r in shown)
    verdicts = [sample.correct for sample in [*stats._samples, *stats._unscored]]
    assert row["accuracy"] == sum(verdicts) / len(verdicts)


def test_every_method_is_here() -> None:
    needing = {config("m", "runs/x", *overrides).method for overrides, _ in NEEDS.values()}
    assert needing == METHODS.keys() - {"distill"}  # as opsd


class Failing(Verdicts):
    """The second check of each batch takes too long."""

    def submit(self, answers):
        grades = super().submit(answers).result()
        grades[1] = Grade(False, None, False, "timeout")
        return SimpleNamespace(result=lambda: grades)


def test_failed_checks_are_told(tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(training, "Grader", lambda **_: Failing(lambda _: True))
    monkeypatch.setattr(run, "write_report", lambda folder: None)
    assert run.train(config(tiny_folder, tmp_path / "run", "steps=1")) == 0
    said = capsys.readouterr().out
    told = "could not be checked and count as wrong: timeout"
    assert f"warning: step 1: 1 of 4 answers {told}" in said
    assert f"step 0, held-out problems: 1 of 6 answers {told}" in said
    (row,) = rows(tmp_path / "run")
    assert row["failed_checks"] == 1 and row["accuracy"] == 0.75 and len(row["warnings"]) == 1
    assert [r["failed_checks"] for r in rows(tmp_path / "run", "evaluations.jsonl")] == [1, 1]
    assert [r["accuracy"] for r in rows(tmp_path / "run", "evaluations.jsonl")] == [5 / 6, 5 / 6]


def test_a_line_about_failures() -> None:
    assert failures([None, None]) == failures([]) == []
    (line,) = failures([None, "timeout", "timeout", "error: " + "x" * 300])
    assert line.startswith("3 of 4 answers could not be checked and count as wrong: timeout")
    assert len(line) < 200


def test_few_processes(monkeypatch) -> None:
    for cores, ranks, wanted in (
        (1, 1, 1),
        (2, 1, 1),
        (8, 1, 4),
        (64, 1, 4),
        (64, 8, 4),
        (8, 8, 1),
    ):
        monkeypatch.setattr("os.cpu_count", partial(int, cores))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert grading_processes() == wanted


def test_a_run_ends_its_processes(tiny_folder, tmp_path, monkeypatch) -> None:
    """One process for the whole run, and none after it, however it ends."""
    started = []
    start = workers._Worker.__init__
    monkeypatch.setattr(
        workers._Worker, "__init__", lambda self, *a: [start(self, *a), started.append(self)][0]
    )
    monkeypatch.setattr(training, "Grader", Grader)
    monkeypatch.setattr(run, "write_report", lambda folder: None)
    assert run.train(config(tiny_folder, tmp_path / "run", "steps=2")) == 0
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, n: [step(self, n), 1 / 0])
    with pytest.raises(ZeroDivisionError):
        run.train(config(tiny_folder, tmp_path / "failing", "evaluation.problems=0"))
    assert len(started) == 2
    assert [worker.process.returncode for worker in started] == [-9, -9]  # and waited for
