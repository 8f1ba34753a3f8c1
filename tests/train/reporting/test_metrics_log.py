"""The run folder's files, and what is shown on a terminal and elsewhere."""

import io
import json
import time

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opsd_train.config.errors import UserError
from opsd_train.reporting.metrics_log import RunLogger, duration, summary_lines

ROW = {
    "loss": 0.5,
    "divergence": 0.25,
    "accuracy": 0.75,
    "tokens_per_second": 210.4,
    "loss_tokens": 640,
    "seconds": 30.0,
    "divergence_by_position": [0.3, float("nan")],
    "top_tokens": [["a", 0.5, 2]],
}
SAMPLE = {
    "problem": "p-1",
    "question": "4 - 1 = [red]?[/red]",
    "answer": "3",
    "completion": "three\x1b[31m",
    "extracted": "three",
    "correct": False,
    "trained": True,
    "divergence": 0.5,
    "tokens": [["three", 0.125], ["\x1b[31m", 0.875]],
}
RESULT = {"accuracy": 0.4, "interval": [0.3, 0.5], "correct": 40, "problems": 100}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_on_disk_at_once(tmp_path):
    with RunLogger(tmp_path / "run", 3, quiet()) as log:
        log.log(1, ROW)
        log.samples(1, [SAMPLE])
        assert lines(tmp_path / "run/metrics.jsonl") == [
            {"step": 1} | ROW | {"divergence_by_position": [0.3, None]}
        ]
        assert lines(tmp_path / "run/samples.jsonl") == [{"step": 1} | SAMPLE]
    assert not (tmp_path / "run/summary.json").exists()


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunLogger(tmp_path, 3, terminal()) as log:
        log.log(1, ROW)
        raise KeyboardInterrupt
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1]


def test_tensorboard_gets_the_numbers(tmp_path):
    with RunLogger(tmp_path, 2, quiet()) as log:
        log.log(1, ROW)
        log.log(2, ROW | {"loss": 0.4})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [
        (1, 0.5),
        (2, 0.4),
    ]
    assert "train/top_tokens" not in events.Tags()["scalars"]


def test_a_new_run_replaces_the_old_one(tmp_path):
    with RunLogger(tmp_path, 2, quiet()) as log:
        log.log(1, ROW)
        log.log(2, ROW)
        log.summary({"status": "finished", "steps": 2})
    with RunLogger(tmp_path, 2, quiet()) as log:
        log.log(1, ROW)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "summary.json").exists()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


class Recorder:
    """A tracker that records its calls."""

    def __init__(self):
        self.calls = []

    def log(self, step, row):
        self.calls.append((step, row["loss"]))

    def finish(self):
        self.calls.append("finish")


def test_trackers_get_every_row_and_the_end(tmp_path):
    tracker = Recorder()
    with pytest.raises(KeyboardInterrupt), RunLogger(tmp_path, 3, trackers=[tracker]) as log:
        log.log(1, ROW)
        raise KeyboardInterrupt
    assert tracker.calls == [(1, 0.5), "finish"]


def test_a_resumed_run_goes_on_without_duplicates(tmp_path):
    with RunLogger(tmp_path, 6, quiet()) as log:
        for step in (1, 2, 3):
            log.log(step, ROW)
            log.samples(step, [SAMPLE, SAMPLE])
    (tmp_path / "report.html").write_text("of the killed run")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write('{"step": 4, "top_tokens": [["é'.encode()[:-1])  # killed while writing
    console = quiet()
    time.sleep(1.1)  # TensorBoard sorts its files by the second they were begun in
    with RunLogger(tmp_path, 6, console, resume_step=2) as log:
        assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
        assert not (tmp_path / "report.html").exists()
        log.log(3, ROW | {"loss": 0.25})
        log.samples(3, [SAMPLE])
    rows = lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert rows[0] == {"step": 1} | ROW | {"divergence_by_position": [0.3, None]}
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3]
    assert not list(tmp_path.glob("*.partial"))
    assert console.file.getvalue().startswith("step 3/6")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]


def test_the_bar_of_a_resumed_run_starts_where_it_stopped(tmp_path):
    console = terminal()
    with RunLogger(tmp_path, 12, console, resume_step=5):
        pass
    assert "5/12" in console.file.getvalue()


def test_a_folder_with_a_broken_row_is_not_resumed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with (
        pytest.raises(UserError, match=r"metrics.jsonl, line 1: not valid JSON"),
        RunLogger(tmp_path, 6, quiet(), resume_step=2),
    ):
        pass


def test_elsewhere_one_plain_line_a_step(tmp_path):
    console = quiet()
    with RunLogger(tmp_path, 12, console) as log:
        log.log(1, ROW)
        log.samples(1, [SAMPLE])
        log.log(2, {"loss": 0.125, "accuracy": None})
    first, second = console.file.getvalue().splitlines()
    shown = ("loss 0.5000", "div 0.2500", "acc 75%", "210 tok/s", "640 tokens", "30.0 s")
    assert first == "  ".join(["step 1/12", *shown, "5 min 30 s left"])
    assert second == "step 2/12  loss 0.1250"


def test_on_a_terminal_a_bar_and_a_table(tmp_path):
    console = terminal()
    with RunLogger(tmp_path, 12, console) as log:
        log.log(1, ROW)
        log.samples(1, [SAMPLE])
    shown = console.file.getvalue()
    assert "1/12 loss 0.5000  div 0.2500  acc 75%  210 tok/s  5 min 30 s left" in shown
    assert "[red]?[/red]" in shown and "three�[31m" in shown
    assert "three\x1b[31m" not in shown


def test_the_table_marks_the_largest_tokens(tmp_path):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    tokens = [["It is ", 0.1], ["three", 2.5], [" now", -0.5], ["x" * 300, 0.0]]
    reference = {"correct": None, "completion": "plain", "question": "q", "answer": "a"}
    with RunLogger(tmp_path, 12, console) as log:
        log.samples(1, [{**SAMPLE, "tokens": tokens}, reference])
    shown = console.file.getvalue()
    assert "It is \x1b[1;4;35mthree\x1b[0m" in shown and shown.count("\x1b[1;4;35m") == 1
    assert "…" in shown and "plain" in shown


def test_summary_is_written_and_printed(tmp_path):
    console = quiet()
    summary = {"status": "finished", "steps": 3, "before": RESULT, "loss": float("inf")}
    with RunLogger(tmp_path, 3, console) as log:
        log.summary(summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary | {"loss": None}
    assert "accuracy, before  40.0% (95% 30.0% to 50.0%; 40 of 100)" in console.file.getvalue()
    assert not list(tmp_path.glob("*.partial"))


def test_summary_lines():
    summary = {
        "status": "interrupted",
        "steps": 3,
        "before": RESULT,
        "after": None,
        "teacher": RESULT,
        "majority": {"answer": "1", "accuracy": 0.2},
        "paired": {"difference": 0.1, "interval": [0.02, 0.18], "gained": 12, "lost": 2},
        "divergence_before": 0.5,
        "divergence_after": 0.25,
        "tokens": 12345,
        "peak_memory_mib": 1500.4,
        "seconds": {"total": 125},
        "report": "runs/x/report.html",
    }
    shown = dict(summary_lines(summary))
    assert shown["status"] == "interrupted after 3 steps"
    assert "accuracy, after" not in shown
    assert shown["accuracy, majority"] == "20.0% (always '1')"
    assert shown["after - before"] == "+10.0 points (95% +2.0 to +18.0; 12 gained, 2 lost)"
    assert shown["divergence"] == "0.5000 before, 0.2500 after"
    assert shown["tokens generated"] == "12,345"
    assert shown["peak memory"] == "1,500 MiB"
    assert shown["time"] == "2 min 05 s"
    assert shown["report"] == "runs/x/report.html"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"), (12000, "3 h 20 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_resumed_evaluations_are_those_of_the_checkpoint(tmp_path):
    """Stopped after step 2 before its evaluation, resumed, killed after it: it comes once more."""
    known, unknown = ({"step": step, "accuracy": 0.5} for step in (0, 2))
    with RunLogger(tmp_path, 4, quiet(), evaluations=[known]) as log:
        log.evaluation(unknown)
    with RunLogger(tmp_path, 4, quiet(), resume_step=2, evaluations=[known]) as log:
        log.evaluation(unknown)
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [known, unknown]
