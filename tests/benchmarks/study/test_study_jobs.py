"""Commands side by side: order, needs, failures, logs."""

import fcntl
from pathlib import Path

from benchmarks.study.subprocesses import BUSY, Subprocess, run_subprocesses


def test_jobs_run_in_order_of_need_and_keep_their_output(tmp_path: Path) -> None:
    jobs = [
        Subprocess("last", ["recipes"], tmp_path / "last.txt", frozenset({"good"})),
        Subprocess("good", ["recipes"], tmp_path / "logs" / "good.txt"),
        Subprocess("bad", ["no/such"], tmp_path / "bad.txt"),
        Subprocess("after bad", ["recipes"], tmp_path / "after.txt", frozenset({"bad"})),
    ]
    ended = {end.job.id: end.code for end in run_subprocesses(jobs, 2)}
    assert ended == {"good": 0, "last": 0, "bad": 2, "after bad": 2}
    assert list(ended).index("good") < list(ended).index("last")
    assert "demo/opsd" in (tmp_path / "logs" / "good.txt").read_text()
    assert "unknown recipe" in (tmp_path / "bad.txt").read_text()
    assert not (tmp_path / "after.txt").exists()


def test_a_job_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("of the other process")
    with open(log) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (end,) = run_subprocesses([Subprocess("busy", ["recipes"], log)], 1)
    assert end.code == BUSY and log.read_text() == "of the other process"
