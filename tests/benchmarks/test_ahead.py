"""The table of steps with and without rollout.ahead, from the JSON of benchmarks.ahead."""

import json
from pathlib import Path

from benchmarks.ahead import line
from benchmarks.report.files import load
from benchmarks.report.pages import ahead
from tests.helpers.report_json import environment


def test_rows_are_medians_over_all_runs(tmp_path: Path) -> None:
    rows = [
        {"ahead": 0, "seconds": [9.0, 3.0], "rollout": [1.0, 2.0]},
        {"ahead": 1, "seconds": [2.5, 1.0], "rollout": [0.1, 0.5]},
        {"ahead": 1, "seconds": [2.0], "rollout": [0.2]},
        {"ahead": 0, "seconds": [5.0], "rollout": [8.0]},
    ]
    settings = {"recipe": "demo/opsd", "steps": 5, "rounds": 2}
    made = {"kind": "ahead", "environment": environment(), "settings": settings, "rows": rows}
    path = tmp_path / "some.json"
    path.write_text(json.dumps(made))
    text = ahead(load([path]))
    lines = [[c.strip() for c in row.strip("|").split("|")] for row in text.splitlines()[-2:]]
    assert lines == [["0", "5.00 s", "2.00 s", "1.00"], ["1", "2.00 s", "200 ms", "2.50"]]
    assert "medians of the steps of 2 runs each" in " ".join(text.split())
    assert line(rows[1]) == "rollout.ahead=1  1.75 s a step, 0.30 s of it for samples"
