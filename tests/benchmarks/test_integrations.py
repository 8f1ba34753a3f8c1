"""The table of TRL's trainers, plain and fused, from its JSON."""

import json
from pathlib import Path

import pytest

from benchmarks.integrations import __main__ as command
from benchmarks.report.files import load
from benchmarks.report.pages import integrations
from opsd_train.config.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/integrations_cpu.json"
STEPS = {"seconds": [4.0, 2.0, 3.0], "peak_extra_mib": [100.0, 300.0, 200.0], "loss": [1.0] * 3}
ROW = {
    "trainer": "SomeTrainer",
    "plain": STEPS,
    "fused": {"seconds": [1.5] * 3, "peak_extra_mib": [50.0] * 3, "loss": [1.0] * 3},
}


def test_a_row_has_medians_and_ratios(tmp_path: Path) -> None:
    content = json.loads(RESULTS.read_text()) | {"rows": [ROW]}
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    row = integrations(load([path])).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["SomeTrainer", "3.00 s", "1.50 s", "0.50", "200 MiB", "50 MiB", "0.25"]


@pytest.mark.parametrize("row", json.loads(RESULTS.read_text())["rows"], ids=lambda r: r["trainer"])
def test_measured_losses_are_alike(row: dict) -> None:
    """Both took the same steps, so what was timed is the same work."""
    assert row["fused"]["loss"] == pytest.approx(row["plain"]["loss"], rel=1e-4, abs=2e-6)


def test_a_trainer_that_dies_ends_in_one_line(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "dead.py").write_text("raise SystemExit('no more memory')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "dead")
    with pytest.raises(UserError, match=r"^sft, plain: its process ended .*no more memory$"):
        command.measure("sft")
