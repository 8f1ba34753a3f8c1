"""What the GPU report makes of compute-sanitizer's output."""

import subprocess

import pytest

from benchmarks.gpu_report import sanitizer
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
            sanitizer.run(f"{tool} tiled fp32", job)
        return
    found = sanitizer.run(f"{tool} tiled fp32", job)
    assert found["in_cublas"] == 2 * (text == IN_CUBLAS) and "SUMMARY" in found["summary"]
