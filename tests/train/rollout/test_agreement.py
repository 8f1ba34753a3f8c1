"""A run whose sampler and trainer mean different distributions stops at its first step."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from opsd_train import cli
from opsd_train.rollout import transformers_engine
from opsd_train.rollout.token_sampling import sampler
from opsd_train.run import train
from tests.helpers.tiny import config, recipe

SHORT = ("steps=1", "evaluation.problems=0", "rollout.max_new_tokens=12")


@pytest.mark.parametrize(
    "settings",
    [
        ("rollout.temperature=1.3",),
        ("rollout.temperature=0.7", "rollout.top_k=5", "lora.dropout=0.5"),
        ("rollout.top_p=0.8", "lora=null"),
        ("model.dtype=bfloat16",),
        ("method=context_distill",),
        ("method=grpo", "rollout.samples_per_prompt=2", "updates_per_step=2"),
    ],
)
def test_they_agree(tiny_folder: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    assert train(config(tiny_folder, tmp_path / "run", *SHORT, *settings)) == 0


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("opsd", ("rollout.top_p=0.9", "rollout.top_k=20")),
        ("opsd", ("model.dtype=bfloat16",)),
        ("grpo", ()),
    ],
)
def test_a_sampler_with_other_logits(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    method: str,
    settings: tuple[str, ...],
) -> None:
    """As if one of the two had overlooked a scale of the logits."""
    monkeypatch.setattr(
        transformers_engine,
        "sampler",
        lambda sampling: sampler(replace(sampling, temperature=2 * sampling.temperature)),
    )
    made = recipe(tiny_folder, tmp_path / "run") | {"method": method}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    asked = [str(tmp_path / "recipe.yaml"), *SHORT, "rollout.samples_per_prompt=2", *settings]
    assert cli.main(asked) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "rollout.engine=transformers samples from another distribution" in line
    assert len(line) < 230 and "LlamaForCausalLM" in line
