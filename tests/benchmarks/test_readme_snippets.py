"""The Python in README and docs runs as pasted."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

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


def test_the_readmes_trainer_trains(tmp_path: Path) -> None:
    """Its first loss is the divergence over full logits, and the student changes."""
    trainer_type = run("README.md 2")["DistillationTrainer"]
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    student, teacher = (LlamaForCausalLM(LlamaConfig(**sizes)) for _ in range(2))
    ids = torch.randint(64, (4, 12))
    labels = torch.where(torch.arange(12) < 3, -100, ids)
    with torch.no_grad():
        log_s, log_t = (m(ids).logits[:, 2:-1].log_softmax(-1) for m in (student, teacher))
    log_m = ((log_s.exp() + log_t.exp()) / 2).log()
    terms = log_t.exp() * (log_t - log_m) + log_s.exp() * (log_s - log_m)
    truth = terms.sum(-1).mean() / 2
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    trainer = trainer_type(student, arguments, train_dataset=rows)
    trainer.teacher = teacher
    before = student.lm_head.weight.detach().clone()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(truth.item(), rel=1e-3)
    assert not torch.equal(before, student.lm_head.weight)
