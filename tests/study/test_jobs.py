"""Commands side by side: order, needs, failures, logs."""

from pathlib import Path

from opsd_train.study.jobs import Job, run_jobs


def test_jobs_run_in_order_of_need_and_keep_their_output(tmp_path: Path) -> None:
    jobs = [
        Job("last", ["recipes"], tmp_path / "last.txt", frozenset({"good"})),
        Job("good", ["recipes"], tmp_path / "logs" / "good.txt"),
        Job("bad", ["no/such"], tmp_path / "bad.txt"),
        Job("after bad", ["recipes"], tmp_path / "after.txt", frozenset({"bad"})),
    ]
    ended = {end.job.id: end.code for end in run_jobs(jobs, 2)}
    assert ended == {"good": 0, "last": 0, "bad": 2, "after bad": 2}
    assert list(ended).index("good") < list(ended).index("last")
    assert "demo/opsd" in (tmp_path / "logs" / "good.txt").read_text()
    assert "unknown recipe" in (tmp_path / "bad.txt").read_text()
    assert not (tmp_path / "after.txt").exists()
