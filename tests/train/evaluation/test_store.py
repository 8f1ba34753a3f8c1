"""An evaluation's folder: what is kept, what is refused, what a kill may leave behind."""

import dataclasses

import pytest

from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.evaluation.sets import EvalProblem
from opsd_train.evaluation.settings import EvalConfig, default_folder
from opsd_train.evaluation.store import Evaluated, GenerationFile, Store

PROBLEMS = [
    EvalProblem("s", "s-1", "1 + 1?\u2028", "2"),
    EvalProblem("t", "t-1", "2 + 2?", "4", "chain_sum", {"question": "2 + 2?", "metadata": {}}),
]


def evaluated(*overrides: str, **changes) -> Evaluated:
    recipe = load_recipe("demo/eval", "eval") | {"output_dir": "here"}
    what = Evaluated("model", None, ["s", "t"], config_from(recipe, overrides, EvalConfig))
    return dataclasses.replace(what, **changes)


def row(problem: str, sample: int) -> dict:
    return {"set": problem[0], "problem": problem, "sample": sample, "text": "2\n\u2028é"}


def test_what_is_kept_comes_back(tmp_path):
    store = Store(tmp_path / "new")
    assert not store.exists
    store.begin(evaluated(), PROBLEMS)
    assert store.exists and store.problems() == PROBLEMS
    with GenerationFile(store.folder, 0, 1) as file:
        file.append([row("s-1", 0), row("s-1", 1)])
        file.append([row("t-1", 0)])
    assert list(store.generations().values()) == [row("s-1", 0), row("s-1", 1), row("t-1", 0)]


def test_files_of_several_processes_are_one(tmp_path):
    for rank, size in ((0, 2), (1, 2), (0, 1)):
        with GenerationFile(tmp_path, rank, size) as file:
            file.append([row("s-1", 2 * rank + size)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "generations.jsonl",
        "generations.rank_0.jsonl",
        "generations.rank_1.jsonl",
    }
    assert {sample for _, _, sample in Store(tmp_path).generations()} == {1, 2, 4}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_half_written_is_dropped_and_written_again(tmp_path, cut):
    with GenerationFile(tmp_path, 0, 1) as file:
        file.append([row("s-1", 0), row("s-1", 1)])
    path = tmp_path / "generations.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert list(Store(tmp_path).generations()) == [("s", "s-1", 0)]
    with GenerationFile(tmp_path, 0, 1) as file:
        file.append([row("s-1", 1)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampling.batch_tokens=99999", "sampling.vllm_memory=0.5"],
        ["grading.seconds=3", "grading.workers=1", "output_dir=elsewhere", "model.device=cuda"],
    ],
)
def test_the_same_evaluation_goes_on(tmp_path, overrides):
    store = Store(tmp_path)
    store.begin(evaluated(), PROBLEMS)
    store.check_same(evaluated(*overrides))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (evaluated("sampling.samples=9"), "settings.sampling.samples was 8 and is 9"),
        (evaluated("prompts.student='{{ problem.question }}'"), "settings.prompts.student"),
        (evaluated("tasks.chain_sum.max_terms=3"), "settings.tasks.chain_sum.max_terms"),
        (evaluated("seed=1"), "seed was 0 and is 1"),
        (evaluated(source="other"), "source was 'model' and is 'other'"),
        (evaluated(weights="checkpoints/step_000002"), "weights was None"),
        (evaluated(sets=["s"]), "sets was"),
    ],
)
def test_another_evaluation_is_refused(tmp_path, other, words):
    store = Store(tmp_path)
    store.begin(evaluated(), PROBLEMS)
    with pytest.raises(UserError, match=r"holds another evaluation.*output_dir=") as error:
        store.check_same(other)
    assert words in str(error.value)


def test_a_folder_without_grades(tmp_path):
    with pytest.raises(UserError, match=r"no grades.jsonl"):
        Store(tmp_path).grades()


def test_the_default_folder_says_what_is_evaluated():
    names = [
        default_folder("Qwen/Qwen3-1.7B", "paper/eval", ["aime24", "data/mine.jsonl"]),
        default_folder("runs/demo/checkpoints/step_000040", "my/own.yaml", ["heldout"]),
    ]
    assert names == [
        "runs/eval-Qwen3-1.7B-paper-eval-aime24-mine",
        "runs/eval-demo-step_000040-my-own-heldout",
    ]
