"""The command line: run the stages of a command, write its report, print what failed."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, default_device, environment
from benchmarks.gpu_report import __doc__ as about
from benchmarks.gpu_report import summary, sweeps
from benchmarks.gpu_report.conductor import Stage, run_stage
from benchmarks.gpu_report.job import GpuJob, Row
from benchmarks.gpu_report.work import message
from benchmarks.losses.memory import CudaMemory

WHEELS = ROOT / ".whl"
# In order, with their time limits in seconds, which are SECONDS together.
STAGES = {
    "first": (
        Stage("ceilings", 20),
        Stage("smoke", 60, triton=True),
        Stage("suite", 120),
        Stage("sanitizer", 60),
        Stage("compiling", 30, triton=True),
        Stage("sweeps", 30, triton=True),
    ),
    "second": (
        Stage("compiling", 40, triton=True),
        Stage("losses", 190),
        Stage("step", 80),
        Stage("kernels", 30, triton=True),
        Stage("counters", 40),
    ),
    "trainer": (
        Stage("trainer_suite", 150),
        Stage("training_run", 120),
    ),
}
SECONDS = {"first": 320.0, "second": 380.0, "trainer": 270.0}
_SHOWN = 40


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if all succeeded, 1 if something failed or did not run, 2 for bad arguments."""
    started = time.time()
    options = _options(arguments)
    if default_device().type != "cuda" and not options.small:
        return _refuse("no GPU here; --small tries the same stages on the CPU")
    winners = None
    if options.command == "second" and options.winners is not None:
        try:
            winners = json.loads(options.winners.read_text())["tiles"]
        except (OSError, ValueError, KeyError) as error:
            return _refuse(f"--winners {options.winners} is not what `first` writes: {error!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    job = GpuJob(options.command, str(options.out.resolve()), options.small, winners)
    for suffix in ("jsonl", "json", "log"):
        job.file(suffix).unlink(missing_ok=True)
    stages, deadline = options.stages or STAGES[job.command], started + SECONDS[job.command]
    with tempfile.TemporaryDirectory() as site:
        wheels = install_wheels(Path(site), job)
        where = environment()  # with the versions of what was just installed
        where["commit"] = options.commit or where["commit"]
        report = {"kind": "gpu_report", "command": job.command, "small": job.small}
        report |= {"environment": where, "peer_wheels": wheels, "winners": winners}
        report |= {"memory_method": CudaMemory.method, "stages": []}
        failed = write_report(report, job, stages)
        for number, stage in enumerate(stages, 1):
            # A stage may also use time that earlier stages, or those not asked for, did not need.
            left, later = deadline - time.time(), sum(x.limit for x in stages[number:])
            limit = max(min(stage.limit, left), left - later)
            report["stages"].append(run_stage(stage, job, limit))
            failed = write_report(report, job, stages[number:])
            if stage.name == "sweeps":
                sweeps.write_winners(job.at("sweeps"), options.out, where)
    print(*summary.lines(report, job.rows()), sep="\n")
    for row in failed[:_SHOWN]:
        print(f"FAILED {row['stage']}, {row['id']}: {row['failed'].splitlines()[0][:160]}")
    print(f"{len(failed)} failed; {job.file('json')}")
    return int(bool(failed))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in STAGES:
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder for the results")
        command.add_argument("--small", action="store_true", help="tiny sizes, any device")
        command.add_argument(
            "--commit", help="the tree's commit, if it has no git history or an older one"
        )
        command.add_argument(
            "--stages", type=functools.partial(_chosen, name), help="only these, as in smoke,suite"
        )
    commands.choices["second"].add_argument(
        "--winners", type=Path, help="winners.json of `first`; without it, the launchers' own tiles"
    )
    return parser.parse_args(arguments)


def _chosen(command: str, names: str) -> tuple[Stage, ...]:
    """The named stages in their order."""
    found = tuple(stage for stage in STAGES[command] if stage.name in names.split(","))
    if len(found) != len(names.split(",")):
        known = ", ".join(stage.name for stage in STAGES[command])
        raise argparse.ArgumentTypeError(f"expected some of {known}, got {names}")
    return found


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def write_report(report: dict[str, Any], job: GpuJob, to_come: tuple[Stage, ...]) -> list[Row]:
    """Write the report so far; returns its failures, among them the stages not yet started."""
    rows = job.rows()
    failed = [{k: row[k] for k in ("stage", "id", "failed")} for row in rows if "failed" in row]
    waiting = {"id": "the stage", "failed": "not started"}
    failed += [{"stage": stage.name} | waiting for stage in to_come]
    whole = report | {"failed": failed, "rows": rows}
    partial = job.file("json").with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n")
    os.replace(partial, job.file("json"))
    return failed


def install_wheels(site: Path, job: GpuJob) -> list[str]:
    """Install the peers' wheels for all processes started from here; returns their names."""
    wheels = sorted(WHEELS.glob("*.whl"))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command = [*pip, "--no-compile", "--target", str(site), *map(str, wheels)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            job.at("wheels").append({"id": str(WHEELS), "failed": message(error)})
            return []
        sys.path.insert(0, str(site))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return [wheel.name for wheel in wheels]


if __name__ == "__main__":
    sys.exit(main())
