"""The Python in README and docs runs as pasted."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from trl.trainer import utils as trl_utils

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SNIPPETS = {f"{page} {n}": block for page in PAGES for n, block in enumerate(blocks(page), 1)}


def run(name: str) -> dict[str, Any]:
    """The names that a snippet defines."""
    found: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(SNIPPETS[name], name, "exec"), found)
    return found


def test_the_pages_have_snippets() -> None:
    assert {"README.md 1", "README.md 2", "docs/losses.md 1", "docs/losses.md 2"} <= set(SNIPPETS)


@pytest.mark.parametrize("name", SNIPPETS)
def test_it_runs(name: str) -> None:
    run(name)


def test_the_readmes_loss_has_a_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("README.md 1")
    gradient = found["student"].grad
    assert gradient.shape == found["student"].shape and gradient.isfinite().all()
    assert not gradient[:16].any() and gradient[16:].any(-1).all()  # the first 16 do not count
    assert "49152" in capsys.readouterr().out  # of the plan


def test_the_readmes_model_has_its_own_loss() -> None:
    """And TRL is left as it was, its functions those of TRL."""
    found = run("README.md 2")
    fused, ids = found["model"], torch.randint(4096, (2, 12))
    plain = LlamaForCausalLM(fused.config)
    plain.load_state_dict(fused.state_dict())
    truth = plain(input_ids=ids, labels=ids)
    output = fused(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.loss, truth.loss)
    assert output.logits is None and truth.logits is not None
    assert found["Trainer"].__mro__[2].__name__ == "SDFTTrainer"
    assert trl_utils._ChunkedLogProbFunction.__module__.startswith("trl.")
