"""What is committed of the study says what its results say."""

from pathlib import Path

from benchmarks.study.outcomes import load_results
from benchmarks.study.tables import rewrite

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT / "docs" / "study"


def test_the_summary_says_what_the_results_say() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    hint = "run python -m benchmarks.study.publish STUDY_FOLDER"
    assert rewrite(text, load_results(PUBLISHED)) == text, hint


def test_what_is_committed_is_small_and_whole() -> None:
    files = [path for path in PUBLISHED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2 * 2**20
    results = load_results(PUBLISHED)
    assert {run["status"] for run in results["runs"].values()} == {"finished"}
    assert set(results["notes"]) == {experiment["name"] for experiment in results["experiments"]}
    page = (PUBLISHED / "study.html").read_text(encoding="utf-8")
    assert all(run["command"].split("output_dir=")[1] in page for run in results["runs"].values())
