"""The packaged recipes: the paper's numbers, and two steps of each recipe on a tiny model."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsd_train import run
from opsd_train.cache_teacher import cache_teacher
from opsd_train.config.load import config_from, load_recipe, recipe_names
from opsd_train.config.schema import Config
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import PromptBuilder
from tests.helpers import devices, qwen3
from tests.helpers.verdicts import made_up

PAPER = [name for name in recipe_names() if name.startswith("paper/")]
DEMO = [name for name in recipe_names() if name.startswith("demo/")]
SIZES = ("1.7b", "4b", "8b")
METHODS = ("opsd", "opsd-later", "opsd-sampled", "grpo", "sft", "sdpo", "sdft")
ALL_WEIGHTS = ("sdpo", "sdft")  # of papers that train no adapters
PROBLEM = Problem("p", "What is 1 + 1?", "2", "Counting on from 1 gives 2.")


def load(name: str, *overrides: str) -> Config:
    return config_from(load_recipe(name), overrides)


def test_one_recipe_for_each_method_and_size() -> None:
    assert {f"paper/{method}-qwen3-{size}" for method in METHODS for size in SIZES} == set(PAPER)


@pytest.mark.parametrize("method", METHODS)
def test_sizes_differ_in_the_model_alone(method: str) -> None:
    recipes = [load_recipe(f"paper/{method}-qwen3-{size}") for size in SIZES]
    names = [recipe["model"].pop("name_or_path") for recipe in recipes]
    assert names == ["Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B"]
    if method == "opsd-later":
        assert [recipe["loss"].pop("token_clip") for recipe in recipes] == [0.05, 0.05, 0.06]
    assert len({recipe.pop("output_dir") for recipe in recipes}) == 3
    assert recipes[0] == recipes[1] == recipes[2]


# Tables 4 and 5 of the paper, and the text of its Appendix B; SDPO's Table 12; SDFT's code.
TABLES = {
    "opsd": {"batch": 32, "samples": 1, "length": 2048, "temperature": 1.1, "lr": 2e-5},
    "opsd-later": {"batch": 32, "samples": 1, "length": 1024, "temperature": 1.1, "lr": 5e-6},
    "opsd-sampled": {"batch": 32, "samples": 1, "length": 2048, "temperature": 1.1, "lr": 2e-5},
    "grpo": {"batch": 32, "samples": 8, "length": 16000, "temperature": 1.2, "lr": 2e-5},
    "sdpo": {"batch": 256, "samples": 8, "length": 8192, "temperature": 1.0, "lr": 1e-5},
    "sdft": {"batch": 32, "samples": 1, "length": 1024, "temperature": 1.0, "lr": 2e-5},
    "sft": {"batch": 64, "samples": 1, "length": 16000, "temperature": 1.0, "lr": 2e-5},
}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_of_the_paper(method: str) -> None:
    config = load(f"paper/{method}-qwen3-4b")
    rollout = config.rollout
    assert TABLES[method] == {
        "batch": config.problems_per_step * rollout.samples_per_prompt,
        "samples": rollout.samples_per_prompt,
        "length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "lr": config.optim.lr,
    }
    lora = config.lora
    if method in ALL_WEIGHTS:
        assert lora is None
    else:
        assert (lora.rank, lora.alpha, set(lora.target_modules)) == (64, 128, PROJECTIONS)
    assert config.model.dtype == "bfloat16" and config.model.gradient_checkpointing
    assert config.evaluation.max_new_tokens == 38912
    if method == "sft":
        assert config.steps == 4 * 30_000 // 64
        assert config.prompts.max_prompt_tokens + config.prompts.max_solution_tokens == 16000
    elif method == "grpo":
        assert config.grpo.kl_weight == 0
    elif method in ALL_WEIGHTS:
        assert (config.opsd.teacher, config.opsd.ema_decay, config.loss.beta) == (
            ("ema", 0.95, 0.5) if method == "sdpo" else ("ema", 0.99, 0)
        )
    else:
        sampled = config.loss.objective == "sampled_token"
        assert sampled == (method == "opsd-sampled") and config.opsd.teacher == "initial"
        assert config.loss.beta == (0 if method == "opsd-later" else 0.5)
    longest = config.prompts.max_prompt_tokens + (
        config.prompts.max_solution_tokens or rollout.max_new_tokens
    )
    assert longest <= min(config.micro_batch_tokens, rollout.batch_tokens)


def prompts(method: str, capsys) -> tuple[str, str, str]:
    """Both prompts as text, and what was printed about them."""
    tokenizer = qwen3.make_tokenizer()
    builder = PromptBuilder(tokenizer, load(f"paper/{method}-qwen3-8b").prompts)
    texts = (tokenizer.decode(build(PROBLEM)) for build in (builder.student, builder.teacher))
    return *texts, capsys.readouterr().err


def test_prompts_of_the_reported_results(capsys) -> None:
    student, teacher, said = prompts("opsd", capsys)
    # What is left of the chat template when its special tokens are taken out.
    assert student.startswith(f"user\nProblem: {PROBLEM.question}\n\n")
    assert student.endswith("in \\boxed{}.\nassistant\n") and "<|" not in student
    assert teacher.startswith(f"<|im_start|>user\nProblem: {PROBLEM.question}\n\n")
    assert f"===\n{PROBLEM.solution}\n===" in teacher and PROBLEM.solution not in student
    assert teacher.endswith("in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    assert said == ""


# SHA-256 of both prompts' token ids, as they were when the first results were made.
DIGESTS = {
    "opsd": "37495ff16fa6fafa",
    "opsd-later": "936b7bb7c7c10e42",
    "grpo": "51a1df8e4d6fea07",
    "sft": "c326503e4d947fa7",
}


@pytest.mark.parametrize("method", DIGESTS)
def test_prompts_of_the_paper_are_what_they_were(method: str) -> None:
    builder = PromptBuilder(qwen3.make_tokenizer(), load(f"paper/{method}-qwen3-1.7b").prompts)
    both = json.dumps([builder.student(PROBLEM), builder.teacher(PROBLEM)])
    assert hashlib.sha256(both.encode()).hexdigest()[:16] == DIGESTS[method]


def test_prompts_of_the_later_recipe(capsys) -> None:
    student, teacher, said = prompts("opsd-later", capsys)
    assert student.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert teacher.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert teacher == prompts("opsd", capsys)[1]
    assert "student's prompt closes the think block, the teacher's leaves it" in " ".join(
        said.replace("the think block alone", "it").split()
    )


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> dict[str, Path]:
    tied, untied = (tmp_path_factory.mktemp(name) for name in ("tied", "untied"))
    qwen3.save_model(tied, tied=True)
    qwen3.save_model(untied, tied=False)
    return {"1.7b": tied, "4b": tied, "8b": untied}


@pytest.fixture
def openthoughts(tmp_path: Path) -> Path:
    """Rows with the columns of the real set, one of them without an answer."""
    rows = [
        {"problem": f"What is {i} + {i}?", "solution": f"Twice {i}.", "Answer": str(2 * i)}
        for i in range(8)
    ]
    rows.append({"problem": "Show that 1 < 2.", "solution": "It is.", "Answer": None})
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def stand_ins(monkeypatch) -> Iterator[None]:
    """Grades that random weights would never earn, for GRPO and STaR; and no report, which takes
    longer than all the rest."""
    monkeypatch.setattr(run, "write_report", lambda folder: None)
    with made_up(lambda answer: sum(map(ord, answer.text)) % 2 == 1):
        yield


def two_steps(config: Config) -> list[dict]:
    """Train, and return the metrics after checking what every method has."""
    assert run.train(config) == 0
    folder = Path(config.output_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    return rows


# The stand-ins for 1.7b and 4b have tied heads, that for 8b has none: 4b adds its numbers alone.
EACH_HEAD = [
    pytest.param(name, marks=pytest.mark.exhaustive) if name.endswith("4b") else name
    for name in PAPER
]


@pytest.mark.parametrize("name", EACH_HEAD)
def test_two_steps_of_the_papers_recipes(
    name: str, tiny_qwen3, openthoughts, stand_ins, tmp_path: Path, capsys
) -> None:
    config = load(
        name,
        f"model.name_or_path={tiny_qwen3[name.rpartition('-')[2]]}",
        f"model.device={devices.NAME}",
        "data.source=file",
        f"data.path={openthoughts}",
        "data.heldout_size=1",
        "steps=2",
        "problems_per_step=2",
        "optim.warmup_steps=0",
        "rollout.engine=transformers",
        "rollout.max_new_tokens=6",
        f"output_dir={tmp_path / 'run'}",
    )
    rows = two_steps(config)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert "an empty 'Answer': 1\n" in capsys.readouterr().err
    if config.lora is None:
        assert (tmp_path / "run" / "model" / "config.json").exists()
        return
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 64 and set(adapter["target_modules"]) == PROJECTIONS


@pytest.mark.parametrize("name", DEMO)
def test_two_steps_of_the_demos(
    name: str, tiny_folder, stand_ins, drawn: None, tmp_path: Path
) -> None:
    teacher = [f"distill.teacher={tiny_folder}"] if "distill" in load_recipe(name) else []
    config = load(
        name,
        f"model.name_or_path={tiny_folder}",
        f"model.device={devices.NAME}",
        "data.train_size=8",
        "data.heldout_size=2",
        "steps=2",
        "problems_per_step=2",
        "rollout.max_new_tokens=6",
        "optim.warmup_steps=0",
        "evaluation.problems=2",
        "evaluation.max_new_tokens=6",
        f"output_dir={tmp_path / 'run'}",
        *teacher,
    )
    if config.distill and config.distill.cache:
        config = replace(config, distill=replace(config.distill, cache=str(tmp_path / "cache")))
        cache_teacher(config)
    rows = two_steps(config)
    # demo/distill uses one model as student and teacher, so its gradient may be 0.
    assert all(row["grad_norm"] > 0 for row in rows) or "demo/distill" in name
