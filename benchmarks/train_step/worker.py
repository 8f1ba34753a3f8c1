"""One contender in its own process: commands as JSON lines on stdin, answers on stdout.

    {"do": "setup", ...Settings}   ->  {"ready": {facts}} or {"why_not": "..."} or {"error": "..."}
    {"do": "step"}                 ->  {"seconds", "phases", "loss", "loss_tokens", "peak_..."}

The process ends when its stdin is closed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from typing import Any, TextIO

from transformers.utils import logging as transformers_logging

from benchmarks.train_step.meters import Memory, Phases
from benchmarks.train_step.registry import CONTENDERS
from benchmarks.train_step.settings import Settings
from benchmarks.train_step.steps import Contender, Step, StepHooks
from benchmarks.train_step.workload import Workload, build
from opsd_train.config.errors import UserError
from opsd_train.distributed.context import resolve_device


class Worker:
    """Runs a contender; each step waits for its command, so that contenders take turns."""

    def __init__(self, commands: TextIO, answers: TextIO) -> None:
        self.commands, self.answers = commands, answers
        self.phases = Phases()

    def serve(self, name: str) -> None:
        """Set the contender up and take its steps."""
        settings = Settings(**self._command("setup"))
        self.phases.wrap_torch()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                work = build(settings, scratch)
                contender = make(name, work, self.phases)
            except UserError as error:
                return self._answer({"error": str(error)})
            except ImportError as error:
                return self._answer({"why_not": _missing(error)})
            self.memory = Memory(resolve_device(work.config.model.device))
            self._answer({"ready": contender.facts() | {"memory_why_not": self.memory.why_not}})
            contender.run(StepHooks(self._begin, self._end))

    def _begin(self) -> None:
        self._command("step")
        gc.collect()
        self.memory.start()
        self.phases.start()

    def _end(self, step: Step) -> None:
        seconds, phases = self.phases.stop()
        made = {"seconds": seconds, "phases": phases, **vars(step), **self.memory.stop()}
        self._answer(made)

    def _command(self, expected: str) -> dict[str, Any]:
        line = self.commands.readline()
        if not line:
            sys.exit(0)
        command = json.loads(line)
        assert command.pop("do") == expected
        return command

    def _answer(self, value: dict[str, Any]) -> None:
        self.answers.write(json.dumps(value) + "\n")
        self.answers.flush()


def make(name: str, work: Workload, phases: Phases) -> Contender:
    """Set up a contender. TRL is imported only for its own contenders."""
    options = CONTENDERS[name]
    if options is None:
        from benchmarks.train_step.ours import OpsdTrain

        return OpsdTrain(work, phases)
    from benchmarks.train_step.trl_sdft import TrlSdft

    return TrlSdft(work, phases, *options)


def _missing(error: ImportError) -> str:
    if error.name in ("trl", "datasets"):  # trl requires datasets
        return "trl is not installed: pip install -e .[bench]"
    return f"does not import here: {error}"


def main() -> None:
    """Serve commands on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    Worker(sys.stdin, answers).serve(sys.argv[1])


if __name__ == "__main__":
    main()
