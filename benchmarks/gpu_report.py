"""Everything a machine with a GPU is asked, in one command and nine minutes.

    python -m benchmarks.gpu_report --out FOLDER            # from the tree, nothing installed
    python -m benchmarks.gpu_report --out FOLDER --small    # what can be tried on a CPU, a minute

Needs torch, triton and pytest. Wheels of peers (liger-kernel, trl, cut-cross-entropy and what they
need) are found in .whl/ at the root of the tree and installed beside, in a temporary folder. The
order: the tests that need a GPU, where the time of the first cases goes, the benchmark selection
for GPUs, the other kernel tests. What is done by the deadline is in FOLDER: gpu_tests.json,
stages.json, losses.json, other_tests.json, report.json. A case that fails is printed, the rest goes
on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, default_device, environment
from benchmarks.losses.cases import COMPILED, Case, check_cases, default_cases
from benchmarks.losses.inputs import MissingInputs
from benchmarks.losses.memory import memory_for
from benchmarks.losses.record import Record
from benchmarks.losses.runner import measure
from benchmarks.losses.stages import stages
from benchmarks.losses.table import render

WHEELS = ROOT / ".whl"
# A case that has not started this long before the end is left out.
_LAST_CASE = 25.0
_FAILED = "failed: "


def main(arguments: list[str] | None = None) -> int:
    """0 when every test passed and every case was measured or is absent for a reason."""
    options = _options(arguments)
    started, seconds = time.time(), 60 * options.minutes
    deadline = started + seconds
    device = default_device()
    if device.type != "cuda" and not options.small:
        print("no GPU here; --small tries the same steps on the CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        peers = install_wheels(Path(site))
        # Tests that hang must leave time for the figures.
        cut = started + seconds / 3
        gpu = run_tests(options.out / "gpu_tests.json", ["-m", "gpu and not slow"], cut)
        failed = write_stages(options.out / "stages.json", device, options)
        losses = run_cases(options.out / "losses.json", device, deadline, options)
        chosen = ["-k", "test_plan"] if options.small else ["-m", "not gpu and not slow"]
        other = run_tests(options.out / "other_tests.json", chosen, deadline)
    report = {
        "environment": environment(),
        "peer_wheels": peers,
        "gpu_tests": gpu,
        "cases": len(losses.cases),
        "skipped": losses.skipped,
        "failed_cases": failed + [c for c in losses.skipped if c["why"].startswith(_FAILED)],
        "other_tests": other,
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("gpu_tests", "other_tests")}, indent=1))
    return int(any(map(bool, (gpu["failed"], other["failed"], report["failed_cases"]))))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--minutes", type=float, default=9.0, help="all in all (default 9)")
    parser.add_argument("--small", action="store_true", help="tiny cases, a few tests, any device")
    parser.add_argument("--commit", help="the tree's commit, where it came without its history")
    return parser.parse_args(arguments)


def install_wheels(site: Path) -> list[str]:
    """Names of the wheels now importable here and in every process started from here."""
    wheels = sorted(WHEELS.glob("*.whl"))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", str(site), *map(str, wheels)], check=True)
        sys.path.insert(0, str(site))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return [wheel.name for wheel in wheels]


def run_tests(path: Path, selection: list[str], deadline: float) -> dict[str, Any]:
    """Run kernel tests in a process of their own; what happened goes to `path` as JSON."""
    left = deadline - time.time()
    if left < 1:
        found = {"tests": 0, "failed": [], "not_run": "no time was left"}
    else:
        found = _pytest(path.with_suffix(".xml"), selection, left)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _pytest(xml: Path, selection: list[str], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", f"--junitxml={xml}"]
    started = time.time()
    try:
        done = subprocess.run([*command, *selection], cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"tests": 0, "failed": [], "not_run": f"stopped after {seconds:.0f} s"}
    if not xml.exists():
        return {"tests": 0, "failed": ["pytest itself"], "exit_code": done.returncode}
    cases = list(ElementTree.parse(xml).iter("testcase"))
    xml.unlink()
    return {
        "tests": len(cases),
        "failed": [_failure(case) for case in cases if _bad(case) is not None],
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "seconds": round(time.time() - started, 1),
        "exit_code": done.returncode,
    }


def _bad(case: ElementTree.Element) -> ElementTree.Element | None:
    failure = case.find("failure")
    return case.find("error") if failure is None else failure


def _failure(case: ElementTree.Element) -> dict[str, str]:
    name = f"{case.get('classname')}::{case.get('name')}"
    return {"test": name, "message": (_bad(case).get("message") or "")[:2000]}


def run_cases(
    path: Path, device: torch.device, deadline: float, options: argparse.Namespace
) -> Record:
    """Measure until the deadline; the file is written after every case."""
    cases = _cases(device, options)
    record = Record(commit=options.commit)
    with memory_for(device) as memory:
        record.memory_method = memory.method
        for number, case in enumerate(cases):
            if deadline - time.time() < _LAST_CASE:
                record.skip(case.id, "no time was left")
                continue
            try:
                compiled = number < COMPILED and not options.small
                record.cases.append(measure(case, device, memory, budget=3.0, compiled=compiled))
            except MissingInputs as error:
                record.skip(case.id, str(error))
            except Exception as error:  # the machine is lent: the other cases are measured still
                traceback.print_exc()
                record.skip(case.id, f"{_FAILED}{error!r}"[:500])
            if device.type == "cuda":
                torch.cuda.empty_cache()
            record.write(path)
    print(render(record.as_json()))
    return record


def _cases(device: torch.device, options: argparse.Namespace) -> list[Case]:
    return check_cases()[::7] if options.small else default_cases(device)


def write_stages(
    path: Path, device: torch.device, options: argparse.Namespace
) -> list[dict[str, str]]:
    """The longest kernels of the first two cases, by case and contender; returns what failed."""
    found, failed = {}, []
    for case in _cases(device, options)[:2]:
        try:
            found[case.id] = stages(case, device)
        except Exception as error:
            traceback.print_exc()
            failed.append({"id": case.id, "why": f"{_FAILED}stages, {error!r}"[:500]})
    path.write_text(json.dumps(found, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
