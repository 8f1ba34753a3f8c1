"""The stage that runs pytest: what passes, fails, is skipped or cannot be collected."""

import tempfile
from pathlib import Path

import pytest

from benchmarks.environment import ROOT
from benchmarks.gpu_report import suite
from benchmarks.gpu_report.conductor import Stage, run_stage
from benchmarks.gpu_report.job import GpuJob

TESTS = """
import pytest
def test_right(): pass
@pytest.mark.slow
def test_slow(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="needs two devices")
def test_absent(): pass
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_error(broken): pass
"""


@pytest.fixture
def tests_of_the_tree(monkeypatch):
    """A file of tests below the root, where pytest's ids are relative to it."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        file = Path(folder, "test_some.py")
        monkeypatch.setattr(suite, "_SMALL", [str(file)])
        yield file


@pytest.mark.slow
def test_the_suite_reports_each_test(tmp_path, tests_of_the_tree, monkeypatch) -> None:
    tests_of_the_tree.write_text(TESTS)
    job = GpuJob("second", str(tmp_path), True)
    slow, others = shards = suite.shards(job)
    monkeypatch.setattr(suite, "shards", lambda _: shards)  # listing them once is slow enough
    assert [i.rpartition("::")[2] for i in slow] == ["test_slow"] and len(others) == 4
    run_stage(Stage("suite", 60), job, 60)
    rows = {row["id"].rpartition("::")[2]: row for row in job.rows()}
    assert {name for name, row in rows.items() if "found" in row} == {"test_right", "test_slow"}
    assert "1 == 2" in rows["test_wrong"]["failed"] and "no fixture" in rows["test_error"]["failed"]
    assert "needs two devices" in rows["test_absent"]["absent"]


@pytest.mark.slow
def test_a_file_of_tests_that_does_not_import_is_a_failure(tmp_path, tests_of_the_tree) -> None:
    """And costs no other file's tests."""
    other = tests_of_the_tree.with_name("test_other.py")
    other.write_text("import no_such_module\n")
    tests_of_the_tree.write_text("def test_right(): pass\n")
    suite._SMALL.append(str(other))
    job = GpuJob("second", str(tmp_path), True)
    summary = run_stage(Stage("suite", 60), job, 60)
    assert (summary["found"], summary["failed"]) == (1, 1)
    failed = next(row for row in job.rows() if "failed" in row)
    assert failed["id"].endswith("test_other.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "says"),
    [(["--no-such-option"], "could not collect"), (["no_such_folder"], "nothing to do")],
)
def test_no_tests_at_all_are_a_failure(tmp_path, monkeypatch, selection: list, says: str) -> None:
    monkeypatch.setattr(suite, "_SMALL", selection)
    job = GpuJob("second", str(tmp_path), True)
    assert run_stage(Stage("suite", 60), job, 60)["failed"] == 1
    assert says in job.rows()[0]["failed"]
