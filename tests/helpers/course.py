"""Compare two runs bit for bit."""

import json
from pathlib import Path


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a .jsonl file in a run folder."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def assert_same_course(run: Path, other: Path) -> None:
    """Two runs have the same metrics, sample tables and trained weights, bit for bit."""
    one, two = ([timeless(row) for row in rows(folder)] for folder in (run, other))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row, wanted in zip(one, two, strict=True):
        assert row == wanted
    assert rows(run, "samples.jsonl") == rows(other, "samples.jsonl")
    (weights,) = run.glob("*/*model.safetensors")
    (wanted_weights,) = other.glob("*/*model.safetensors")
    assert weights.read_bytes() == wanted_weights.read_bytes()


def timeless(row: dict) -> dict:
    """The row without machine-dependent metrics: seconds, tokens per second, memory."""
    return {k: value for k, value in row.items() if "second" not in k and "peak_mib" not in k}
