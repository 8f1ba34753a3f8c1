"""The kernel tests that need a GPU, split over many processes, slow ones first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.environment import ROOT
from benchmarks.gpu_report.job import Emit, GpuJob, deal
from benchmarks.gpu_report.work import leave_if_lost

_WHERE = "tests/kernels"
_GPU = [_WHERE, "-m", "gpu"]
# A few tests that are fast on a CPU.
_SMALL = [f"{_WHERE}/test_plan.py", "-k", "budget or backend"]
_COLLECTING = 60.0
_MARK = "collected: "
_OPTIONS = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]


def shards(job: GpuJob) -> list[list[str]]:
    """The slow tests, which need most of the memory, in one process; the others in the rest."""
    return dealt(_SMALL if job.small else _GPU, job)


def dealt(selection: list[str], job: GpuJob) -> list[list[str]]:
    """The tests that pytest selects, as `shards` deals them."""
    command = [sys.executable, "-m", "benchmarks.gpu_report.suite", *selection]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_COLLECTING)
    line = next((x for x in done.stdout.splitlines() if x.startswith(_MARK)), None)
    if line is None:
        print(done.stdout, done.stderr, sep="\n")
        raise RuntimeError(f"pytest could not collect the tests: exit status {done.returncode}")
    found = json.loads(line.removeprefix(_MARK))
    slow, quick = ([i for i, is_slow in found if is_slow == wanted] for wanted in (True, False))
    return [slow] * bool(slow) + deal(quick, max(1, job.workers - bool(slow)))


def work(ids: list[str], job: GpuJob, emit: Emit) -> None:
    """Run these tests; a passed one is recorded as "found", a skipped one as "absent"."""
    code = pytest.main([*_OPTIONS, *ids], plugins=[_Reporter(emit)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(int(code))


class _Reporter:
    """Records a row after a test's teardown."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.outcome, self.seconds = emit, {}, 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.failed:
            self.outcome = {"failed": str(report.longrepr)[-2000:]}
        elif report.skipped:
            reason = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            )
            self.outcome = {"absent": str(reason)}
        if report.when == "teardown":
            row = {"id": report.nodeid, "seconds": round(self.seconds, 2)}
            self.emit(row | (self.outcome or {"found": {}}))
            failed, self.outcome, self.seconds = "failed" in self.outcome, {}, 0.0
            if failed:
                leave_if_lost()


class _Collector:
    """Prints every test and whether it is slow; a file that cannot be imported counts as a test."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(report.nodeid)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        found = [[i.nodeid, i.get_closest_marker("slow") is not None] for i in session.items]
        found += [[name, False] for name in self.broken]
        print(f"\n{_MARK}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    sys.exit(pytest.main(["--collect-only", *_OPTIONS, *sys.argv[1:]], plugins=[_Collector()]))
