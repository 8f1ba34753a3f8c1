"""The losses beside a busy process: it computes only while it should, and the table's figures."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks import neighbour as module
from benchmarks.environment import environment
from benchmarks.losses.cases import TINY, Case
from benchmarks.losses.contenders import contenders
from benchmarks.report.files import load
from benchmarks.report.pages import neighbour

CASE = Case("jsd", "frozen", "float32", TINY, 16)


def cpu_ticks(pid: int) -> int:
    """Time that a process has computed (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_the_neighbour_computes_only_when_told() -> None:
    with module.neighbour() as process:
        found = [cpu_ticks(process.pid)]
        for told in (signal.SIGSTOP, signal.SIGCONT):
            process.send_signal(told)
            time.sleep(0.5)
            found.append(cpu_ticks(process.pid))
    assert found[0] == found[1] < found[2]
    assert process.returncode == -signal.SIGKILL


def test_every_contender_is_called_in_both_states(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [c for c in contenders(CASE, torch.device("cpu")) if not c.compiles]
    monkeypatch.setattr(module, "contenders", lambda *_: quick)
    rows = module.measure(CASE, rounds=1)
    assert {"bare GEMMs", "opsd_kernels", "PyTorch eager"} <= {row["name"] for row in rows}
    for row in rows:
        assert all(len(row["seconds"][state]) == 1 for state in module.STATES)


def test_a_row_is_of_the_medians(tmp_path: Path) -> None:
    seconds = {"alone": [0.002, 0.001, 0.009], "beside": [0.003, 0.02, 0.001]}
    content = {
        "kind": "neighbour",
        "environment": environment(),
        "settings": {"case": "some", "rounds": 3},
        "rows": [{"name": "ours", "role": "ours", "seconds": seconds}],
    }
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    last = neighbour(load([path])).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "ours", "2.00 ms", "3.00 ms", "1.50",
    ]  # fmt: skip
