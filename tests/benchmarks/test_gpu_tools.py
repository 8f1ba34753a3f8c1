"""What the GPU report makes of the output of Nsight Compute and compute-sanitizer."""

import subprocess

import pytest
import torch

from benchmarks.gpu_report import counters, sanitizer
from benchmarks.gpu_report.job import GpuJob

IN_CUBLAS = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at nvjet_sm90_tss_64x32_splitK_NNT+0xb20
=========     and Write access at nvjet_sm90_tss_64x32_splitK_NNT+0x3080 [96 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
IN_OURS = """\
========= Error: Race reported between Write access at merge+0xf70 in triton_merge.py:47
=========     and Write access at merge+0xf70 in triton_merge.py:47 [14 hazards]
"""
BROKEN = "========= Target application returned an error\n"


@pytest.mark.parametrize(
    ("tool", "text", "code", "says"),
    [
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards", 0, None),
        ("racecheck", IN_CUBLAS, 9, None),
        ("racecheck", IN_CUBLAS + IN_OURS, 9, "merge"),
        ("racecheck", IN_CUBLAS + BROKEN, 9, "ended with 9"),
        ("racecheck", BROKEN, 9, "ended with 9"),
        ("memcheck", IN_CUBLAS, 9, "ended with 9"),
    ],
    ids=["clean", "cublas", "ours", "broken-and-cublas", "broken", "memcheck"],
)
def test_a_race_in_cublas_is_named_and_one_of_ours_fails(
    tool: str, text: str, code: int, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, text, "")
    monkeypatch.setattr(sanitizer.subprocess, "run", lambda *_, **__: done)
    job = GpuJob("first", "", True)
    if says is not None:
        with pytest.raises(RuntimeError, match=says):
            sanitizer.run(f"{tool} tiled fp32 losses", job)
        return
    found = sanitizer.run(f"{tool} tiled fp32 losses", job)
    assert found["in_cublas"] == 2 * (text == IN_CUBLAS) and "SUMMARY" in found["summary"]


@pytest.mark.parametrize("family", sanitizer._FAMILIES)
def test_the_program_under_the_sanitizer_runs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this device; every operation in both dtypes, with its backward."""
    ran, ours = [], sanitizer.our_call
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(sanitizer, "our_call", lambda x, *how: ran.append(x) or ours(x, *how))
    sanitizer.smallest("blocked", "fp32", family)
    assert len(ran) == 2 * len(sanitizer._FAMILIES[family])
    assert all(x.student.grad.abs().max() > 0 for x in ran)


NCU = """\
==PROF== Connected to process 7
==PROF== Profiling "gemm" - 0: 0%....100% - 9 passes
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","ns","byte","register/thread"
"0","gemm<128>","1,000.5","512","168"
"1","statistics_pair","3000","n/a","64"
"""


def test_the_counters_of_the_longest_kernels_are_read() -> None:
    first, second = counters.longest(NCU)
    assert first["name"] == "statistics_pair" and first["dram__bytes_read.sum"] is None
    assert second == {
        "name": "gemm<128>",
        "gpu__time_duration.sum": 1000.5,
        "dram__bytes_read.sum": 512,
        "launch__registers_per_thread": 168,
    }
    assert counters.longest("==ERROR== no such metric\n") == []
