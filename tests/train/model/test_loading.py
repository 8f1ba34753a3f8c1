"""Loading models: the attention implementation, and models that are refused."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from opsd_kernels.integrations import heads
from opsd_train import cli
from opsd_train.checkpoint.export import export
from opsd_train.config.errors import UserError
from opsd_train.distributed.context import DistributedContext
from opsd_train.dry_run.plan import dry_run
from opsd_train.model import policy as model
from opsd_train.model.policy import attention, load_model, load_policy, load_teacher, load_tokenizer
from opsd_train.run import train
from tests.helpers.family_models import FAMILIES, SIZES
from tests.helpers.tiny import config, make_tokenizer, recipe, save_model

ALONE = DistributedContext(torch.device("cpu"))


def save(folder: Path, family: str, **settings) -> Path:
    """Save a tiny model of the family, with the tiny tokenizer."""
    save_model(folder)
    torch.manual_seed(0)
    sizes = SIZES | FAMILIES.get(family, {}) | {"vocab_size": 261, "max_position_embeddings": 200}
    made = transformers.AutoConfig.for_model(family, **(sizes | settings))
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("gemma"), "gemma2")


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("modernbert"), "modernbert-decoder")


# ---------------------------------------------------------------------------------------- attention


def test_auto_takes_the_attention_that_the_model_has(gemma: Path, tiny_folder: Path) -> None:
    for folder, wanted in ((gemma, "eager"), (tiny_folder, "sdpa")):
        settings = config(folder, "runs/none").model
        loaded = load_model(settings, make_tokenizer(), torch.float32)
        assert loaded.config._attn_implementation == wanted


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("llama", ["model.dtype=bfloat16"], "flash_attention_2"),
        ("gemma2", ["model.dtype=bfloat16"], "flash_attention_2"),
        ("llama", [], None),  # FlashAttention has no float32
        ("llama", ["model.dtype=bfloat16", "model.device=cpu"], None),
        ("llama", ["model.dtype=bfloat16", "model.attention=sdpa"], "sdpa"),
        ("bloom", ["model.dtype=bfloat16"], None),
    ],
)
def test_flash_attention_where_gpu_type_and_model_have_it(
    family: str, changes: list[str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = transformers.AutoConfig.for_model(family)
    monkeypatch.setattr(model, "load_model_config", lambda config: made)
    monkeypatch.setattr(model, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(model, "resolve_device", lambda n: torch.device(n.replace("auto", "cuda")))
    assert (
        attention(config("some/model", "runs/none", "model.device=auto", *changes).model) == wanted
    )


def test_an_attention_the_model_lacks_is_one_line(gemma: Path) -> None:
    settings = config(gemma, "runs/none", "model.attention=sdpa").model
    with pytest.raises(UserError, match="sdpa: Gemma2ForCausalLM does not support it"):
        load_model(settings, make_tokenizer(), torch.float32)


@pytest.mark.slow
def test_a_model_without_sdpa_is_planned_trained_and_exported(gemma: Path, tmp_path: Path) -> None:
    made = config(gemma, tmp_path / "run", "steps=1", "evaluation.problems=0")
    assert "memory expected" in dry_run(made)
    assert train(made) == 0
    merged = export(tmp_path / "run", merged=True)
    assert transformers.AutoConfig.from_pretrained(merged).model_type == "gemma2"


# ----------------------------------------------------------------------------------------- refusals


def refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, *changes: str) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, tmp_path / "run")))
    assert cli.main([str(path), *changes]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and len(line) < 207
    return line


def test_a_model_of_another_shape_is_one_line(
    modernbert: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = refused(modernbert, tmp_path, capsys)
    assert "(ModernBertDecoderForCausalLM) is not" in line and "returns Linear" in line


def test_a_model_that_transformers_does_not_know_as_a_causal_lm(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    transformers.ResNetConfig().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)  # a long path would leave no room for the reason
    assert "ResNetConfig" in refused(Path("model"), tmp_path, capsys)


def test_a_model_that_cannot_be_sampled_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save(tmp_path / "model", "mamba")
    line = refused(folder, tmp_path, capsys, "lora.target_modules=[in_proj]")
    assert "cannot sample from" in line and "MambaForCausalLM" in line


@pytest.mark.slow
def test_sft_of_a_model_that_cannot_be_sampled_from(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "mamba")
    changes = ["method=sft", "lora.target_modules=[in_proj]", "evaluation.problems=0", "steps=1"]
    assert train(config(folder, tmp_path / "run", *changes)) == 0


def test_student_and_teacher_are_checked(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", "granite")
    distill = ["method=distill", f"distill.teacher={folder}", "distill.dtype=float32"]
    made = config(tiny_folder, tmp_path / "run", *distill)
    tokenizer, teacher = load_tokenizer(made.model), made.distill.by_name()[None]
    load_teacher(made, teacher, tokenizer, ALONE, "none")
    monkeypatch.delitem(heads.FAMILIES, "granite")
    with pytest.raises(UserError, match=f"^model {folder} \\(GraniteForCausalLM\\)"):
        load_teacher(made, teacher, tokenizer, ALONE, "none")
    with pytest.raises(UserError, match=f"^model {folder} \\(GraniteForCausalLM\\)"):
        load_policy(config(folder, "runs/none").model, None, tokenizer, ALONE, "none")
