"""The table of decoding speed, from its JSON."""

import json
from pathlib import Path

from benchmarks.report.files import load
from benchmarks.report.pages import decode

RESULTS = Path(__file__).parents[2] / "benchmarks/results/decode_cpu.json"


def test_a_row_is_of_the_median_round(tmp_path: Path) -> None:
    seconds = {"ours": [9.0, 2.0, 1.0], "generate": [4.0, 5.0, 8.0]}
    row = {"dtype": "float32", "batch": 4, "tokens": 25, "seconds": seconds}
    path = tmp_path / "some.json"
    path.write_text(json.dumps(json.loads(RESULTS.read_text()) | {"rows": [row]}))
    cells = [cell.strip() for cell in decode(load([path])).splitlines()[-1].strip("|").split("|")]
    assert cells == ["float32", "4", "50.0", "20.0", "2.50"]
