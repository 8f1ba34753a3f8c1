"""docs/gpu.md holds what the GPU commands measured, each table with device and commit."""

import pytest

from benchmarks.report import gpu
from benchmarks.report.__main__ import main
from benchmarks.report.data import ReportError
from benchmarks.report.files import load
from benchmarks.report.pages import rewrite
from benchmarks.report.results import results_table
from tests.helpers.report_json import case, environment, run, write, write_results

PARTS = ("gpu_losses", *gpu.PARTS)
PAGE = "\n".join(f"<!-- benchmark: {part} -->\n<!-- /benchmark: {part} -->" for part in PARTS)
WHERE = "Test GPU, 2 cores (1 threads), 7.5 GiB, Python 3.11.7, torch 2.13.0, commit 012345678"


OUTCOMES = ("found", "absent", "failed")


def row(stage: str, identifier: str, **outcome: object) -> dict:
    return {"stage": stage, "id": identifier, "seconds": 1.0} | outcome


def report(command: str, *rows: dict, **changes: object) -> dict:
    place = environment("Test GPU", "cuda")
    names = dict.fromkeys(r["stage"] for r in rows)
    stages = [
        {"name": name, "limit": 75, "seconds": 70.5}
        | {k: sum(k in r for r in rows if r["stage"] == name) for k in OUTCOMES}
        for name in names
    ]
    failed = [{k: r[k] for k in ("stage", "id", "failed")} for r in rows if "failed" in r]
    return {
        "kind": "gpu_report",
        "command": command,
        "small": False,
        "environment": place | {"commit": "0123456789abcdef"},
        "memory_method": "growth of the peak",
        "winners": {},
        "peer_wheels": [],
        "stages": stages,
        "failed": failed,
        "rows": list(rows),
    } | changes


def trained(seconds: float, peak: float, at_once: int) -> dict:
    phases = {"teacher forward": [0.1], "loss": [seconds / 2], "optimizer": [0.01]}
    memory = {"peak_extra_mib": peak, "peak_mib": 2 * peak}
    settings = {"at_once": at_once, "sequences": 8, "completion": 1024}
    more = {"loss": [0.5], "loss_tokens": 8192, "settings": settings}
    return {"phases": phases, "seconds": [seconds]} | memory | more


FIRST = report(
    "first",
    row("ceilings", "copy", found={"ms": 1.4, "bytes": 2**31, "gb_per_s": 3012.4}),
    row("ceilings", "dh slice new", found={"ms": 0.09, "shape": [384, 19200, 4096], "tflops": 670}),
    row("kernels", "jsd frozen blocked shared", found={
        "ms": 61.2, "plan": "21 blocks", "predicted": {"logits": 98765.4},
        "kernels": [["divergence_gradient", 22, 6.1], ["mm (384, 4096)", 44, 30.25]],
    }),
    row("sweeps", "row 4096x8", found={"ms": 1.25}),
    row("sweeps", "rows 512", found={"ms": 58.0, "workspace_mib": 600.5, "rows_per_block": 512}),
    row("counters", "blocked", found={"kernels": [{
        "name": "statistics_pair",
        "gpu__time_duration.sum": 170000.0,
        "dram__bytes_read.sum": 2**29,
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": 91.4,
    }]}),
    row("smoke", "jsd tiled shared bfloat16 50257", failed="AssertionError: loss is off by 1"),
)  # fmt: skip
SECOND = report(
    "second",
    row("losses", "jsd-frozen-bfloat16-small-1024-random", found=case(tokens=1024)),
    row("losses", "jsd-frozen-bfloat16-small-64-real", absent="no captured pair here"),
    row("step", "opsd_kernels, 8 at once", found=trained(1.5, 900.0, 8)),
    row("step", "plain logits, 8 at once", absent="out of memory with 8 sequences at once"),
    row("step", "opsd_kernels, 2 at once", found=trained(2.0, 500.0, 2)),
    row("step", "plain logits, 2 at once", found=trained(3.0, 2000.0, 2)),
    row("sanitizer", "all of it", absent="compute-sanitizer is not on the PATH"),
)
TRAINER = report(
    "trainer",
    row("training_run", "paper/opsd-qwen3-1.7b", found={
        "settings": {"problems": 8, "completion": 256},
        "seconds": {"rollout": [8.0, 7.0, 9.5], "student": [0.5, 0.25, 0.75]},
        "peak_mib": {"rollout": [5000.0, 5001.0, 5000.0], "student": [7000.0, 7000.0, 7000.0]},
        "expected_mib": {"student": 98765.4},
    }),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path)
    (tmp_path / "README.md").write_text(PAGE)
    return tmp_path


def sections(folder) -> dict[str, str]:
    """The text of each part of the page."""
    assert run(folder) == 0
    text = (folder / "README.md").read_text()
    found = {}
    for part in PARTS:
        begin, end = f"<!-- benchmark: {part} -->", f"<!-- /benchmark: {part} -->"
        found[part] = text.partition(begin)[2].partition(end)[0]
    return found


def test_what_was_not_measured_is_said(folder) -> None:
    (folder / "json" / "gpu.json").unlink()
    assert all(text.strip() == gpu.NOTHING for text in sections(folder).values())


def test_the_page_of_this_tree_says_what_its_results_say(capsys) -> None:
    assert main(["--check"]) == 0, capsys.readouterr()


def test_the_page_holds_the_figures(folder) -> None:
    (folder / "json" / "gpu.json").unlink()
    write(folder, "gpu_first", FIRST)
    write(folder, "gpu_second", SECOND)
    write(folder, "gpu_trainer", TRAINER)
    found = sections(folder)
    files = {"gpu_losses": "gpu_second", "gpu_step": "gpu_second", "gpu_trainer": "gpu_trainer"}
    for part, text in found.items():
        assert WHERE in " ".join(text.split()), part
        assert f"{files.get(part, 'gpu_first')}.json" in text
    assert "A copy moves 3,012 GB/s" in found["gpu_products"]
    times = "\N{MULTIPLICATION SIGN}"
    product = f"| dh slice new | 384 {times} 19,200 {times} 4,096 | 90.0 µs | 670 |"
    assert product in found["gpu_products"]
    assert "jsd frozen blocked shared, 61.2 ms in all: 21 blocks." in found["gpu_kernels"]
    assert "| divergence_gradient | 22 | 6.10 ms |" in found["gpu_kernels"]
    assert "| rows 512 | 58.0 ms | 600 MiB | 512 |" in found["gpu_sweeps"]
    dash = "\N{EN DASH}"
    counters = f"| statistics_pair | 170 µs | 512 MiB | {dash} | 91 % | {f'{dash} | ' * 4}"
    assert counters.rstrip() in found["gpu_counters"]
    assert "| **opsd_kernels** | **1.25** | **44 MiB** |" in found["gpu_losses"]
    assert "| **whole step** | **2.00 s** | **3.00 s** |" in found["gpu_step"]
    assert "| peak extra memory | 500 MiB | 2,000 MiB |" in found["gpu_step"]
    assert "plain logits: out of memory with 8 sequences at once" in found["gpu_step"]
    assert "| rollout | 8.00 s | 5,001 MiB |" in found["gpu_trainer"]
    assert "| student | 500 ms | 7,000 MiB |" in found["gpu_trainer"]
    checks = " ".join(found["gpu_checks"].split())
    assert "| smoke | 012345678 | 0 | 0 | 1 | 70.5 s |" in checks
    assert "jsd tiled shared bfloat16 50257: AssertionError: loss is off by 1." in checks
    assert "sanitizer, all of it: compute-sanitizer is not on the PATH." in checks


def test_of_a_stage_that_ran_twice_the_newest_is_shown(folder) -> None:
    """Beside stages of other reports, each with its commit; one that never started is named."""
    (folder / "json" / "gpu.json").unlink()
    waiting = {"stage": "sanitizer", "id": "the stage", "failed": "not started"}
    first = FIRST | {"failed": [*FIRST["failed"], waiting]}
    write(folder, "gpu_first", first)
    again = report("first", row("smoke", "jsd tiled", found={}), row("smoke", "kl", found={}))
    again["environment"] |= {"commit": "fedcba9876543210", "date": "2026-01-03 03:04"}
    write(folder, "gpu_first_2", again)
    text = " ".join(sections(folder)["gpu_checks"].split())
    assert "| smoke | fedcba987 | 2 | 0 | 0 | 70.5 s |" in text and "loss is off" not in text
    assert "| ceilings | 012345678 | 2 | 0 | 0 | 70.5 s |" in text
    assert "sanitizer, the stage: not started." in text
    write(folder, "gpu_second", SECOND)
    checks = " ".join(sections(folder)["gpu_checks"].split())
    assert "not started" not in checks and "compute-sanitizer is not on the PATH" in checks


def test_the_results_have_a_step_that_another_took_too(folder) -> None:
    """With 8 sequences at once plain logits were out of memory: the row is that of 2."""
    write(folder, "gpu_second", SECOND)
    (folder / "json" / "train_step.json").unlink()
    rows = results_table(load([folder / "json"])).rows
    (step,) = (row for row in rows if "Qwen3-1.7B's shape" in row[0])
    assert step[1:3] == ("2.00 s, 500 MiB", "plain logits: 3.00 s, 2,000 MiB")


def test_predicted_figures_are_in_no_table_of_measured_ones(folder) -> None:
    write(folder, "gpu_first", FIRST)
    write(folder, "gpu_trainer", TRAINER)
    assert not any("98,765" in text or "98.8 s" in text for text in sections(folder).values())


def test_a_rehearsal_is_no_measurement(folder) -> None:
    write(folder, "gpu_first", FIRST | {"small": True})
    with pytest.raises(ReportError, match=r"gpu_first.json .*rehearsal"):
        load([folder / "json"])


def test_a_report_of_nothing_leaves_a_page_that_says_what_failed(folder) -> None:
    (folder / "json" / "gpu.json").unlink()
    lost = report("first", row("ceilings", "copy", failed="not done: the stage was stopped"))
    write(folder, "gpu_first", lost)
    text = rewrite(PAGE, load([folder / "json"]))
    assert text.count(gpu.NOTHING) == len(PARTS) - 1 and "not done: the stage was stopped" in text


def test_what_shares_a_reason_is_counted(folder) -> None:
    """And of a test's traceback what it asserted is shown."""
    late = [row("suite", f"test_{i}", failed="not done: the stage was stopped") for i in range(3)]
    trace = "def test():\n>   assert 1 == 2\nE   assert 1 == 2\n\ntest.py:3: AssertionError"
    write(folder, "gpu_first", report("first", *late, row("suite", "test_red", failed=trace)))
    text = " ".join(sections(folder)["gpu_checks"].split())
    assert (
        "suite, 3 of them: not done: the stage was stopped; suite, test_red: assert 1 == 2." in text
    )
