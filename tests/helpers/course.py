"""What two runs must have in common to be the same run."""

import json
from pathlib import Path


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def assert_same_course(run: Path, other: Path) -> None:
    """Every number of every step, the samples shown and the trained weights, to the last bit."""
    one, two = ([timeless(row) for row in rows(folder)] for folder in (run, other))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row, wanted in zip(one, two, strict=True):
        assert row == wanted
    assert rows(run, "samples.jsonl") == rows(other, "samples.jsonl")
    (weights,) = run.glob("*/*model.safetensors")
    (wanted_weights,) = other.glob("*/*model.safetensors")
    assert weights.read_bytes() == wanted_weights.read_bytes()


def timeless(row: dict) -> dict:
    """Without what depends on the machine: seconds, tokens per second, memory."""
    return {k: value for k, value in row.items() if "second" not in k and "peak_mib" not in k}
