"""Evaluations of the tiny model and its runs: whole, killed and gone on with, graded again."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd_train import cli
from opsd_train.checkpoint.export import export
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.data.problems import load_problems
from opsd_train.distributed.context import DistributedContext, init_distributed
from opsd_train.evaluation import evaluate as evaluation
from opsd_train.evaluation.evaluate import evaluate, print_difference, regrade
from opsd_train.evaluation.generate import generate
from opsd_train.evaluation.grading import grade_one
from opsd_train.evaluation.settings import EvalConfig
from opsd_train.evaluation.source import find_source, open_engine
from opsd_train.evaluation.store import GenerationFile, Store
from opsd_train.model.policy import load_tokenizer
from opsd_train.rollout.transformers_engine import TransformersEngine
from tests.helpers import devices

SMALL = (
    "model.dtype=float32",
    f"model.device={devices.NAME}",
    "sampling.samples=3",
    "sampling.max_new_tokens=6",
    "sampling.batch_tokens=600",
    "problems=4",
    "grading.workers=1",
)
GREEDY = ("sampling.samples=1", "sampling.temperature=0")


@pytest.fixture(autouse=True)
def graded_here(monkeypatch):
    """No processes to grade in: they take seconds to start. `whole` has them."""

    def grade(answers, *, seconds, workers):
        return [grade_one(answer) for answer in answers]

    monkeypatch.setattr(evaluation, "grade", grade)


def settings(folder: Path, *overrides: str) -> EvalConfig:
    recipe = load_recipe("demo/eval", "eval") | {"output_dir": str(folder)}
    return config_from(recipe, [*SMALL, *overrides], EvalConfig)


def rows(folder: Path, name: str = "generations.jsonl") -> list[dict]:
    made = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return sorted(made, key=lambda row: (row["set"], row["problem"], row["sample"]))


def by_problem(folder: Path) -> dict[str, str]:
    return {row["problem"]: row["text"] for row in rows(folder)}


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """An evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "eval"
    evaluate(settings(folder), str(model_folder), ["chain_sum", "products"])
    return folder


def test_every_sample_is_made_graded_and_scored(whole, model_folder):
    made, graded = rows(whole), rows(whole, "grades.jsonl")
    assert len(made) == len(graded) == 2 * 4 * 3
    assert len({(row["set"], row["problem"], row["sample"]) for row in made}) == len(made)
    assert len({row["text"] for row in made}) > 20  # samples of a problem differ
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    problems = {problem.problem: problem for problem in Store(whole).problems()}
    for row, grade in zip(made, graded, strict=True):
        assert row["finished"] or row["tokens"] == 6
        assert (grade["tokens"], grade["finished"]) == (row["tokens"], row["finished"])
        content = f"{problems[row['problem']].question}\nShow your work."
        chat = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert row["prompt_tokens"] == len(ids)
    scores = json.loads((whole / "scores.json").read_text())
    assert list(scores) == ["chain_sum", "products"]
    assert (scores["chain_sum"]["problems"], scores["chain_sum"]["samples"]) == (4, 3)


def test_the_model_is_on_the_device_of_the_recipe(model_folder, tmp_path):
    config = settings(tmp_path / "eval")
    source = find_source(str(model_folder), config.model)
    tokenizer, context = load_tokenizer(source.model), init_distributed(devices.NAME)
    opened = open_engine(config, source, tokenizer, context, scratch=tmp_path, longest=50)
    with opened as engine:
        assert engine.policy.device == context.device


def test_a_killed_evaluation_goes_on_to_the_same_completions(
    whole, model_folder, tmp_path, monkeypatch
):
    config, made = settings(tmp_path / "eval"), TransformersEngine.generate
    calls = []

    def killed_at_the_third(self, requests, sampling):
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(self, requests, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", killed_at_the_third)
    arguments = config, str(model_folder), ["chain_sum", "products"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments)
    path = tmp_path / "eval" / "generations.jsonl"
    assert len(rows(tmp_path / "eval")) == sum(calls[:2]) > 0
    assert not (tmp_path / "eval" / "scores.json").exists()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"set": "chain_sum", "prob')
    evaluate(*arguments)
    assert sum(calls) - calls[2] == 24  # nothing was made twice
    for name in ("generations.jsonl", "grades.jsonl"):
        assert rows(tmp_path / "eval", name) == rows(whole, name)
    scores = [(folder / "scores.json").read_text() for folder in (tmp_path / "eval", whole)]
    assert scores[0] == scores[1]
    calls.clear()
    evaluate(*arguments)  # finished: nothing is generated
    assert calls == []


class Rank(DistributedContext):
    """One of several processes that are not there."""

    def broadcast(self, value):
        return pickle.loads(pickle.dumps(value))


def test_ranks_make_disjoint_parts_of_the_same_completions(whole, model_folder, tmp_path):
    from opsd_train.evaluation.eval_prompts import EvalPrompts
    from opsd_train.evaluation.store import Evaluated

    sets = ["chain_sum", "products"]
    config, store = settings(tmp_path), Store(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    store.begin(Evaluated("m", None, sets, config), Store(whole).problems())
    source = find_source(str(model_folder), config.model)
    prompts = EvalPrompts(tokenizer, config, sets, None)
    counts = {}
    # One of two ranks, as if the other had been killed; then three ranks make the rest.
    for rank, size in ((1, 2), (0, 3), (1, 3), (2, 3)):
        before = len(store.generations())
        context = Rank(torch.device("cpu"), rank, size)
        generate(config, source, store, prompts, context, lambda done, total: None)
        counts[rank, size] = len(store.generations()) - before
    assert counts[1, 2] == 12 and sum(counts.values()) == 24
    key = lambda row: (row["set"], row["problem"], row["sample"])  # noqa: E731
    assert sorted(store.generations().values(), key=key) == rows(whole)


def greedy_by_transformers(folder: Path, run, problems) -> dict[str, str]:
    """Greedy completions of a whole model in a folder, for the run's own prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = {}
    for problem in problems:
        chat = [{"role": "user", "content": problem.question}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts[problem.id] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return texts


def test_a_run_is_evaluated_with_what_it_learnt(run_folder, model_folder, tmp_path):
    run = config_from(load_recipe(str(run_folder / "config.yaml")))
    problems = load_problems(run.data)[1][:4]
    export(run_folder, tmp_path / "merged", merged=True)
    wanted = greedy_by_transformers(tmp_path / "merged", run, problems)
    base = greedy_by_transformers(model_folder, run, problems)
    assert wanted != base
    (checkpoint,) = (run_folder / "checkpoints").glob("step_*")
    without = tmp_path / "run"
    shutil.copytree(run_folder, without, ignore=shutil.ignore_patterns("checkpoints"))
    for name, source in (("newest", run_folder), ("step", checkpoint), ("end", without)):
        evaluate(settings(tmp_path / name, *GREEDY), str(source), ["heldout"])
        assert by_problem(tmp_path / name) == wanted, name
    # The base model on the held-out problems of the run, under the run's prompts.
    evaluate(settings(tmp_path / "base", *GREEDY), str(model_folder), [str(run_folder)])
    assert by_problem(tmp_path / "base") == base
    difference = print_difference(tmp_path / "newest", tmp_path / "base")
    assert difference["heldout"]["problems"] == 4


def test_a_run_without_weights(run_folder, tmp_path):
    shutil.copy(run_folder / "config.yaml", tmp_path)
    with pytest.raises(UserError, match=r"no weights yet"):
        evaluate(settings(tmp_path / "eval"), str(tmp_path), ["heldout"])


@pytest.fixture
def no_model(monkeypatch):
    """Nothing of a model can be loaded."""

    def fail(*_, **__):
        raise AssertionError("a model is loaded")

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", fail)


def answered(folder: Path, whole: Path, texts) -> Path:
    """A copy of an evaluation in which each completion is texts(problem, sample)."""
    shutil.copytree(whole, folder)
    problems = {(p.set, p.problem): p for p in Store(whole).problems()}
    made = rows(folder)
    (folder / "generations.jsonl").unlink()
    with GenerationFile(folder, 0, 1) as file:
        for row in made:
            problem = problems[row["set"], row["problem"]]
            file.append([row | {"text": texts(problem, row["sample"])}])
    return folder


def test_grading_again_needs_no_model(whole, tmp_path, no_model, capsys):
    folder = answered(tmp_path / "eval", whole, lambda p, i: p.answer if i < 2 else "no idea")
    kept = (folder / "generations.jsonl").read_bytes()
    assert cli.main(["eval", str(folder), "--regrade", "--recipe", "demo/eval"]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["chain_sum"]["avg"]["value"] == pytest.approx(2 / 3)
    assert scores["products"]["pass"]["2"]["value"] == 1
    assert (folder / "generations.jsonl").read_bytes() == kept
    assert "66.7 %" in capsys.readouterr().out
    # The folder may also be named by what it evaluated.
    assert regrade(settings(folder), "some/model") == folder
    with pytest.raises(UserError, match=r"--regrade: neither nothing nor .*none"):
        regrade(settings(tmp_path / "none"), "nothing")


def test_a_file_is_graded_by_math_verify(model_folder, tmp_path, no_model):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1/4 + 1/4?", "answer": "\\\\frac{1}{2}"}\n')
    config = settings(tmp_path / "eval", "sampling.samples=2")
    from opsd_train.evaluation.sets import load_set
    from opsd_train.evaluation.store import Evaluated

    store = Store(tmp_path / "eval")
    problems = load_set(str(path), config, None)
    store.begin(Evaluated("m", None, [str(path)], config), problems)
    made = {"set": str(path), "problem": "mine-1", "prompt_tokens": 9, "tokens": 5}
    with GenerationFile(store.folder, 0, 1) as file:
        for sample, text in enumerate(("It is \\boxed{0.5}.", "It is \\boxed{2}.")):
            file.append([made | {"sample": sample, "text": text, "finished": True}])
    scores = evaluation.score(store, config.grading)
    assert [row["correct"] for row in rows(store.folder, "grades.jsonl")] == [True, False]
    assert scores[str(path)]["pass"]["2"]["value"] == 1


def test_the_difference_to_another_evaluation(whole, tmp_path, no_model, capsys):
    right = answered(tmp_path / "right", whole, lambda p, i: p.answer)
    mixed = answered(
        tmp_path / "mixed", whole, lambda p, i: p.answer if p.set == "products" else "x"
    )
    for folder in (right, mixed):
        regrade(settings(folder), str(folder))
    capsys.readouterr()
    command = ["eval", str(right), "--regrade", "--recipe", "demo/eval"]
    assert cli.main([*command, "--against", str(mixed)]) == 0
    out = capsys.readouterr().out
    assert "chain_sum: +100.0 points against" in out and "products: +0.0 points" in out
    assert "4 problems of both" in out
    # Only problems of both count, whatever their numbers are.
    problems = [json.loads(line) for line in (mixed / "problems.jsonl").read_text().splitlines()]
    for problem in problems[1:]:
        problem["question"] += " (another one)"
    (mixed / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    found = print_difference(right, mixed)
    assert {name: value["problems"] for name, value in found.items()} == {"chain_sum": 1}
    with pytest.raises(UserError, match=r"no grades.jsonl"):
        print_difference(right, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "sets", "words"),
    [
        (["sampling.max_new_tokens=5000"], ["chain_sum"], ["context of 2048", "or less"]),
        (["sampling.batch_tokens=50"], ["chain_sum"], ["sampling.batch_tokens=50", "raise it"]),
        (["prompts.max_prompt_tokens=9"], ["chain_sum"], ["prompts.max_prompt_tokens=9"]),
        ([], ["chain_sum", "chain_sum"], ["twice"]),
        ([], ["heldout"], ["held-out problems of a run"]),
        (["prompts.student='{{ problem.no }}'"], ["chain_sum"], ["prompts.student"]),
    ],
)
def test_mistakes_are_told(model_folder, tmp_path, overrides, sets, words):
    with pytest.raises(UserError) as error:
        evaluate(settings(tmp_path / "eval", *overrides), str(model_folder), sets)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "eval" / "generations.jsonl").exists()


def test_greedy_sampling_has_one_sample(tmp_path):
    with pytest.raises(UserError, match=r"temperature=0.*sampling.samples=1"):
        settings(tmp_path, "sampling.temperature=0")
